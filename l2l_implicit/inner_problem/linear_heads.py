r"""T linear heads in closed form: cross-entropy or squared error, no autograd.

With features :math:`X` (``[m, d]``), outputs :math:`Z = X W^\top + c` (``[m, k]``), the loss's
gradient :math:`G` and Hessian product :math:`S` in the outputs
(`l2l_implicit.inner_problem.losses`), and a direction :math:`(V, e)` with :math:`U = X V^\top + e`:

.. math:: \nabla_W = G^\top X, \quad \nabla_c = G^\top 1, \qquad
          \nabla^2_\phi \, (V, e) = ((S U)^\top X, (S U)^\top 1), \qquad
          \nabla^2_{X\phi} \, (V, e) = G V + (S U) W.

At the minimum :math:`\phi = a + A^\top X` with :math:`A = -G / l_2`: few-shot learning has fewer samples
than features, and in A (``[m, k]``) the problem is as small as the samples are few. Newton's method runs
there on the Gram matrix, and the backward pass solves with the same factor. All of it is float64,
whatever the features are: a system of a few hundred unknowns costs next to nothing, and its condition
number is that of the features squared.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from l2l_implicit.inner_problem.linearization import Linearization, Products
from l2l_implicit.inner_problem.losses import Inverse, OutputLoss
from l2l_implicit.inner_problem.regularizer import SquaredDistance
from l2l_implicit.linear_solvers.conjugate_gradient import conjugate_gradient
from l2l_implicit.linear_solvers.solution import (
    FACTORED,
    NON_FINITE,
    ZERO,
    LinearSolution,
    damped,
)

MOST_SAMPLES = 512  # of a task whose problem is solved in the span of its samples
_MOST_STEPS, _MOST_REFINEMENTS, _NEAR = 100, 6, 2e-3


class HeadProblem(NamedTuple):
    """What T inner problems of linear heads are made of.

    Attributes:
        x: the features, ``[T, m, d]``, float64, detached; a copy that nobody else writes to.
        source: the tensor with history that ``x`` is a copy of, in its own shape, or None.
        loss: with its targets; its outputs are of no matter.
        quadratic: the regulariser.
        weight: shape of a head's weight, ``[k, d]``.
        bias: whether the head adds a bias.
        goal: movement and relative residual that are small enough for the head's precision.
    """

    x: Tensor
    source: Tensor | None
    loss: OutputLoss
    quadratic: SquaredDistance
    weight: Size
    bias: bool
    goal: float

    def outputs(self, vector: Tensor) -> Tensor:
        """``X V' + e`` for heads ``[T, n]``, shape ``[T, m, k]``."""
        weights = self.weights(vector)
        if not self.bias:
            return torch.bmm(self.x, weights.mT)
        return torch.baddbmm(vector[:, self.weight.numel() :].unsqueeze(1), self.x, weights.mT)

    def weights(self, vector: Tensor) -> Tensor:
        """The weights ``[T, k, d]`` in a vector ``[T, n]``, a view."""
        return vector[:, : self.weight.numel()].view(-1, *self.weight)

    def in_phi(self, per_output: Tensor) -> Tensor:
        """Gradients in phi, ``[T, n]``, of functions with gradients ``[T, m, k]`` in the outputs."""
        weight = torch.bmm(per_output.mT, self.x).flatten(1)
        return torch.cat([weight, per_output.sum(1)], 1) if self.bias else weight

    def gram(self) -> Tensor:
        """``X X'``, plus 1 where there is a bias, shape ``[T, m, m]``."""
        gram = torch.bmm(self.x, self.x.mT)
        return gram.add_(1.0) if self.bias else gram

    def task(self, t: int) -> HeadProblem:
        """The problem of task ``t`` alone."""
        loss = type(self.loss)(self.loss.outputs, self.loss.targets[t : t + 1], self.loss.scale)
        return self._replace(x=self.x[t : t + 1], source=None, loss=loss)


def goal_of(dtype: torch.dtype) -> float:
    """A few roundings of ``dtype``, at most 1e-6; float64's is as near as the solves come."""
    return min(max(8.0 * torch.finfo(dtype).eps, 1e-13), 1e-6)


def goal_of(dtype: torch.dtype) -> float:
    """A few roundings of ``dtype``, at most 1e-6; float64's is as near as the solves come."""
    return min(max(8.0 * torch.finfo(dtype).eps, 1e-13), 1e-6)


class LinearHeads(Linearization):
    """`Linearization` of a `HeadProblem`; phi is the weight, row by row, and then the bias."""

    is_bound = True

    def __init__(self, problem: HeadProblem, point: Tensor) -> None:
        super().__init__(point, problem.quadratic)
        self.problem = problem
        self.quadratic: SquaredDistance = problem.quadratic
        # The Gram matrix, and the inverse of a Newton step's Hessian; see `OutputLoss.inverse`.
        self._factored: tuple[Tensor, Inverse | None] | None = None
        self.known: Any = None  # what the loss was recognised as, for the learner

    @cached_property
    def loss(self) -> OutputLoss:
        """The loss at ``point``."""
        return self.problem.loss.moved(self.problem.outputs(self.point))

    @cached_property
    def gradient(self) -> Tensor:  # type: ignore[override]
        return self.quadratic.add_gradient(self.problem.in_phi(self.loss.gradient), self.point)

    @property
    def objective(self) -> Tensor:
        return self.loss.value + self.quadratic.value(self.point)

    def hvp(self, vector: Tensor) -> Tensor:
        change = self.loss.curve(self.problem.outputs(vector))
        return self.quadratic.add_hvp(self.problem.in_phi(change), vector)

    def moved(self, point: Tensor) -> LinearHeads:
        """The same objectives linearized at another ``point``, shape ``[T, n]``."""
        return LinearHeads(self.problem, point)

    def task(self, t: int) -> LinearHeads:
        """Task ``t`` alone, T = 1, without its way to theta."""
        return LinearHeads(self.problem.task(t), self.point[t : t + 1])

    can_evaluate = True

    def evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        there = self.moved(point)
        return there.objective, there.gradient

    def sources(self) -> list[Tensor]:
        source = self.problem.source
        return [*([] if source is None else [source]), *self.quadratic.sources()]

    def mixed_vjp(self, answer: LinearSolution) -> Products:
        v, source = answer.solution, self.problem.source
        products: Products = []
        if source is not None:
            curved = answer.outputs
            if curved is None:
                curved = self.loss.curve(self.problem.outputs(v))
            product = torch.bmm(self.loss.gradient, self.problem.weights(v))
            product = torch.baddbmm(product, curved, self.problem.weights(self.point))
            # Autograd rounds it to half precision, where an overflow is a scaler's business.
            wide = torch.promote_types(source.dtype, torch.float32)
            products.append(product.to(wide).view(source.shape))
        return products + self.quadratic.mixed_vjp(self.point, v)

    # The minimum, and systems there, in the span of the samples.

    def reducible(self) -> bool:
        """Whether `minimum` knows the problem: strongly convex, of not too many samples."""
        return self.quadratic.strength > 0 and self.problem.x.shape[1] <= MOST_SAMPLES

    def minimum(self) -> LinearHeads:
        r"""The same objectives linearized at their minima.

        Newton's method on A from A = 0, which is the anchor: where it starts is of no matter for a
        strongly convex problem. With :math:`\rho = G + l_2 A` and the Gram matrix K the gradient is
        :math:`X^\top \rho` and the step :math:`\Delta A = -(\rho - \hat S K \rho / l_2) / l_2`,
        :math:`\hat S` the inverse of `OutputLoss.inverse`. Near the minimum a step of movement
        :math:`\omega` leaves one of :math:`\omega^2 / 2`: the last digit costs one more step.
        """
        problem, strength = self.problem, self.quadratic.strength
        gram = problem.gram()
        kernel, center = gram / strength, self.quadratic.center
        base = gram.new_zeros(*gram.shape[:2], problem.weight[0])
        if center is not None:
            base = problem.outputs(center.expand_as(self.point))
        a, outputs, last = torch.zeros_like(base), base, math.inf
        active = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
        steps, inverse = torch.zeros_like(active, dtype=torch.long), None
        for _ in range(_MOST_STEPS if base.numel() else 0):
            loss = problem.loss.moved(outputs)
            if inverse is None or last > _NEAR:  # near enough the last one does
                inverse = loss.inverse(kernel)
            rho = torch.add(loss.gradient, a, alpha=strength)
            change = inverse(kernel @ rho).sub_(rho).div_(strength)
            move = gram @ change
            omega = loss.movement(move)
            largest = float(omega.max())
            if not largest <= 1.75:  # below it a whole step lowers the objective for certain
                share = self._share(loss, a, outputs - base, change, move, rho, omega)
                if share is not None:
                    change, move = share * change, share * move
            a, outputs, steps = a + change, outputs + move, steps + active
            active = active & (omega > _NEAR)
            small = largest < _NEAR and 0.5 * largest * max(largest, last) <= problem.goal
            if small or largest < 1e-3 and largest > 0.5 * last or math.isnan(largest):
                break  # solved; at rounding's floor; lost
            last = largest
        point = problem.in_phi(a)
        there = LinearHeads(problem, point if center is None else point + center)
        there.solved, there.steps = True, steps
        there._factored = gram, inverse
        return there

    def _share(
        self, loss: OutputLoss, a: Tensor, ka: Tensor, change: Tensor, move: Tensor, rho: Tensor,
        omega: Tensor,
    ) -> Tensor | None:  # fmt: skip
        r"""How much of a long Newton step to take, ``[T, 1, 1]``; None for all of it.

        The whole step where it lowers the objective enough, else the best of a few, one of which,
        :math:`\ln(1 + \omega) / \omega`, lowers it for certain: the Hessian changes by at most
        :math:`e^{\omega}` along the step (Sun, Tran-Dinh 2019).
        """
        strength = self.quadratic.strength
        linear, square = (ka * change).sum((1, 2)), (move * change).sum((1, 2))
        now, slope = loss.value, (rho * move).sum((1, 2))

        def rises(shares: Tensor) -> Tensor:
            trials = loss.outputs + shares.unsqueeze(-1).unsqueeze(-1) * move
            penalty = strength * shares * (linear + 0.5 * shares * square)
            return loss.moved(trials).value - now + penalty

        whole = torch.ones_like(omega)
        if bool((rises(whole) <= 1e-4 * slope).all()):
            return None
        sure = torch.where(omega.isfinite(), torch.log1p(omega) / omega, 0.0)
        halves = torch.exp2(-torch.arange(12.0, dtype=omega.dtype, device=omega.device))
        shares = torch.cat([halves.unsqueeze(1).expand(-1, len(omega)), sure.unsqueeze(0)])
        best = rises(shares).nan_to_num(nan=torch.inf).argmin(0, keepdim=True)
        return torch.where(omega > 1.75, shares.gather(0, best)[0], whole).view(-1, 1, 1)

    def solve(self, b: Tensor, damping: float) -> LinearSolution:
        r"""``(H + damping I) v = b`` by the minimum's factor and refinements, shapes ``[T, n]``.

        :math:`v = (b - X^\top q) / \mu` with :math:`q = S X v`, which solves
        :math:`(S^{-1} + K / \mu) q = X b / \mu`; :math:`\mu` is l2 plus the damping. A factor from
        one step before the minimum, or without the damping, is as good: a refinement makes up for it.
        """
        problem, mu = self.problem, self.quadratic.strength + damping
        if self._factored is None:
            return conjugate_gradient(damped(self.hvp, damping), b, 1000, 1e-10)
        gram, inverse = self._factored
        kernel = gram / mu
        if inverse is None or damping:
            inverse = self.loss.inverse(kernel)
        b_norm = torch.linalg.vector_norm(b, dim=1)
        right = problem.outputs(b) / mu
        q, best = inverse(right), math.inf
        for _ in range(_MOST_REFINEMENTS):
            residual = q - self.loss.curve(right - kernel @ q)
            k_residual = kernel @ residual
            norm = (residual * k_residual).sum((1, 2)).mul_(mu).clamp_min_(0.0).sqrt_()
            relative = torch.where(b_norm > 0, norm / b_norm, 0.0)
            largest = float(relative.max())
            if largest <= problem.goal or not largest < 0.5 * best:
                break
            best, q = largest, q - residual + inverse(k_residual)
        v = (b - problem.in_phi(q)).div_(mu)
        steps, reasons = torch.zeros_like(relative, dtype=torch.long), [FACTORED] * len(b)
        good = v.sum(1).isfinite() & relative.isfinite()
        if not bool((good & (b_norm > 0)).all()):
            names = zip(good.tolist(), b_norm.tolist(), strict=True)
            reasons = [NON_FINITE if not g else ZERO if n == 0 else FACTORED for g, n in names]
            v, q = (torch.where(good.view(-1, *[1] * (t.dim() - 1)), t, 0.0) for t in (v, q))
            relative = torch.where(good, relative, torch.inf)
        return LinearSolution(v, steps, relative, reasons, q)

    # How wrong the hypergradient is.

    @cached_property
    def _longest(self) -> Tensor:
        """Norm of the longest sample's features, with the bias's 1, ``[T]``."""
        squares = self.problem.x.square().sum(-1) + float(self.problem.bias)
        if not squares.shape[1]:
            return squares.sum(1)
        return squares.amax(1).sqrt()

    def inner_error(self, first_norm: float) -> Tensor:
        r"""A bound: the minimum is within :math:`\|\nabla g\| / \mu`, and no sample's outputs move by
        more than the longest sample times that; within :math:`\omega` of it b, H and the mixed
        derivative each stay within factors :math:`e^{\pm\omega}`."""
        if self.quadratic.strength == 0.0:
            return super().inner_error(first_norm)
        omega = self.loss.movement_of(self._longest * self.gradient_norm / self.quadratic.strength)
        return torch.expm1(3.0 * omega)

    def rounding_error(self, b: Tensor, answer: LinearSolution, dtype: torch.dtype) -> Tensor:
        r"""phi and b are rounded to ``dtype``: the outputs by :math:`\epsilon` times their own size, b
        relative to its own, and what of it lies beyond the span is divided by :math:`\mu`."""
        eps, strength = torch.finfo(dtype).eps, self.quadratic.strength
        if strength == 0.0:
            return super().rounding_error(b, answer, dtype)
        b_norm = torch.linalg.vector_norm(b, dim=1)
        v_norm = torch.linalg.vector_norm(answer.solution, dim=1)
        tiny = torch.finfo(b.dtype).tiny
        amplified = b_norm / (strength * v_norm).clamp_min(tiny)
        size = self._longest * torch.linalg.vector_norm(self.point, dim=1)
        return eps * amplified * (1.0 + size + self._longest / b_norm.clamp_min(tiny))
