r"""T linear heads in closed form: cross-entropy or squared error, no autograd.

With features :math:`X` (``[m, d]``), outputs :math:`Z = X W^\top + c` (``[m, k]``), the loss's
gradient :math:`G` and Hessian product :math:`S` in the outputs
(`l2l_implicit.inner_problem.losses`), and a direction :math:`(V, e)` with :math:`U = X V^\top + e`:

.. math:: \nabla_W = G^\top X, \quad \nabla_c = G^\top 1, \qquad
          \nabla^2_\phi \, (V, e) = ((S U)^\top X, (S U)^\top 1), \qquad
          \nabla^2_{X\phi} \, (V, e) = G V + (S U) W.

At the minimum :math:`\phi = a + A^\top X` with :math:`A = -G / l_2`: few-shot learning has fewer
samples than features, and in A (``[m, k]``) the problem is as small as the samples are few.
Newton's method runs there on the Gram matrix, and the backward pass solves with the same factor.
All of it is float64, whatever the features are: a system of a few hundred unknowns costs next to
nothing, and its condition number is that of the features squared.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.linalg import vector_norm

from l2l_implicit.inner_problem.linearization import (
    Linearization,
    Products,
    Sizes,
    SquaredDistance,
)
from l2l_implicit.inner_problem.losses import Inverse, OutputLoss
from l2l_implicit.linear_solvers import solution
from l2l_implicit.linear_solvers.conjugate_gradient import conjugate_gradient
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec, System

MOST_SAMPLES = 512  # of a task whose problem is solved in the span of its samples
GOALS = {torch.float64: 1e-13}  # what is small enough; 1e-6 for features of less precision
_MOST_STEPS, _MOST_REFINEMENTS, _NEAR, _TINY = 100, 6, 2e-3, 1e-300


class HeadProblem(NamedTuple):
    """What T inner problems of linear heads are made of."""

    x: Tensor  # the features, [T, m, d], float64, detached; a copy that nobody else writes to
    source: Tensor | None  # the tensor with history that x is a copy of, in its own shape
    loss: OutputLoss  # with its targets; its outputs are of no matter
    quadratic: SquaredDistance
    weight: Size  # shape of a head's weight, [k, d]
    bias: bool
    goal: float  # movement and relative residual that are small enough for the features' precision

    def outputs(self, vector: Tensor) -> Tensor:
        """``X V' + e`` for heads ``[T, n]``, shape ``[T, m, k]``."""
        weights = self.weights(vector)
        if not self.bias:
            return torch.bmm(self.x, weights.mT)
        return torch.baddbmm(vector[:, self.weight.numel() :].unsqueeze(1), self.x, weights.mT)

    def weights(self, vector: Tensor) -> Tensor:
        """The weights ``[T, k, d]`` in a vector ``[T, n]``, a view."""
        return vector[:, : self.weight.numel()].view(len(vector), *self.weight)

    def rows(self) -> Tensor:
        """The features, with a 1 for the bias, ``[T, m, d]`` or ``[T, m, d + 1]``."""
        return torch.cat([self.x, torch.ones_like(self.x[..., :1])], 2) if self.bias else self.x

    def in_phi(self, per_output: Tensor) -> Tensor:
        """Gradients in phi, ``[T, n]``, of functions with ``[T, m, k]`` in the outputs."""
        weight = torch.bmm(per_output.mT, self.x).flatten(1)
        return torch.cat([weight, per_output.sum(1)], 1) if self.bias else weight

    def gram(self) -> Tensor:
        """``X X'``, plus 1 where there is a bias, shape ``[T, m, m]``."""
        gram = torch.bmm(self.x, self.x.mT)
        return gram.add_(1.0) if self.bias else gram


class LinearHeads(Linearization):
    """`Linearization` of a `HeadProblem`; phi is the weight, row by row, and then the bias.

    Attributes:
        solved: whether ``point`` is the minimum, found exactly; `solve` then has the factor.
        known: what the loss was recognised as, of the same numbers.
    """

    solved = False
    known: Any = None
    # The Gram matrix, and the inverse of a Newton step's Hessian; see `OutputLoss.inverse`.
    _factored: tuple[Tensor, Inverse | None] | None = None
    _rho: Tensor | None = None  # the gradient in the span of the samples, ``[T, m, k]``

    def __init__(self, problem: HeadProblem, point: Tensor) -> None:
        self.problem, self.point, self.quadratic = problem, point, problem.quadratic

    @cached_property
    def loss(self) -> OutputLoss:
        """The loss at ``point``."""
        return self.problem.loss.moved(self.problem.outputs(self.point))

    @cached_property
    def gradient(self) -> Tensor:  # type: ignore[override]
        offset = self.quadratic.offset(self.point)
        return self.problem.in_phi(self.loss.gradient).add_(offset, alpha=self.quadratic.strength)

    @property
    def gradient_norm(self) -> Tensor:
        if self._rho is None or self._factored is None:
            return super().gradient_norm
        gram = self._factored[0]
        return (self._rho * torch.bmm(gram, self._rho)).sum((1, 2)).clamp_min_(0.0).sqrt_()

    @property
    def objective(self) -> Tensor:  # type: ignore[override]
        return self.loss.value(self.loss.outputs) + self.quadratic.value(self.point)

    def hvp(self, vector: Tensor) -> Tensor:
        change = self.loss.curve(self.problem.outputs(vector))
        return self.problem.in_phi(change).add_(vector, alpha=self.quadratic.strength)

    def diagonal(self) -> Tensor:
        """That of the Hessian, exactly, ``[T, n]``."""
        own = self._curvatures().diagonal(dim1=0, dim2=3)
        squares = self.problem._replace(x=self.problem.x.square())
        return squares.in_phi(own).add_(self.quadratic.strength)

    def kronecker_inverse(self, shift: float) -> Matvec:
        r"""The inverse of :math:`A \otimes B + \mu I`, an approximation of the (damped) Hessian.

        A is the features' :math:`X^\top X`, B the mean over the samples of the loss's Hessian in
        the outputs; in the singular vectors of X and the eigenvectors of B the matrix is diagonal.
        For the squared error it is the Hessian itself.

        Args:
            shift: :math:`\mu`, l2 plus the damping, above 0.

        References:
            Martens, Grosse (2015), Kronecker-factored Approximate Curvature.
        """
        problem = self.problem
        outputs, turn = torch.linalg.eigh(self._curvatures().mean(2).transpose(0, 1))
        basis, values, _ = torch.linalg.svd(problem.rows(), full_matrices=False)
        outputs = outputs.clamp_min_(0.0).unsqueeze(1)
        share = outputs / (outputs * values.square().unsqueeze(2) + shift)

        def inverse(vector: Tensor) -> Tensor:
            curved = share * torch.bmm(torch.bmm(basis.mT, problem.outputs(vector)), turn)
            part = problem.in_phi(torch.bmm(basis, torch.bmm(curved, turn.mT)))
            return (vector - part).div_(shift)

        return inverse

    def _curvatures(self) -> Tensor:
        """S of each sample as a matrix, ``[k, T, m, k]``."""
        outputs, k = self.loss.outputs, self.problem.weight[0]
        each = torch.eye(k, dtype=outputs.dtype, device=outputs.device).view(k, 1, 1, k)
        return self.loss.curve(each.expand(k, *outputs.shape))

    def moved(self, point: Tensor) -> LinearHeads:
        """The same objectives linearized at another ``point``, shape ``[T, n]``."""
        return LinearHeads(self.problem, point)

    def task(self, t: int) -> LinearHeads:
        """Task ``t`` alone, T = 1, without its way to theta."""
        own, (x, _, loss, quadratic, *_) = slice(t, t + 1), self.problem
        loss = type(loss)(loss.outputs, loss.targets[own], loss.scale)
        if quadratic.center is not None and len(quadratic.center) > 1:
            quadratic = SquaredDistance(quadratic.strength, [quadratic.center[own]], x.dtype)
        alone = self.problem._replace(x=x[own], source=None, loss=loss, quadratic=quadratic)
        return LinearHeads(alone, self.point[own])

    def tilted(self, slope: Tensor, damping: float) -> LinearHeads:
        r"""The same plus :math:`\langle s, \phi \rangle + (\delta/2) \|\phi - \phi_0\|^2`.

        The regulariser has another strength, its centre is each task's own, and small steps count.

        Args:
            slope: s, shape ``[T, n]``; :math:`\phi_0` is the present point.
            damping: :math:`\delta`, above 0 where there is no regulariser.
        """
        strength = self.quadratic.strength + damping
        pull = self.quadratic.offset(self.point) * self.quadratic.strength + slope
        center = self.point - pull / strength
        quadratic = SquaredDistance(strength, [center], center.dtype, len(center))
        problem = self.problem._replace(quadratic=quadratic, goal=GOALS[torch.float64])
        return LinearHeads(problem, self.point)

    def gradients(self, point: Tensor) -> tuple[Tensor, Products]:
        r"""At a ``point``, ``[T, n]``: :math:`\nabla_\phi g`, and the loss's gradient in the
        features where these are part of theta, ``[T, m, d]``."""
        there = self.moved(point)
        in_features = torch.bmm(there.loss.gradient, self.problem.weights(point))
        return there.gradient, [] if self.problem.source is None else [in_features]

    def sees(self, known: Any) -> None:
        """From now on theta enters by what ``known``, a recognised loss of the same numbers, has.

        It is kept here, since the features' history must die with the linearization.
        """
        self.known, self.problem = known, self.problem._replace(source=known.source)

    def elsewhere(self, point: Tensor) -> tuple[Tensor, Tensor]:
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

    def minimum(self) -> LinearHeads | None:
        r"""The same objectives linearized at their minima; None for too many samples, or l2 = 0.

        Newton's method on :math:`C = l_2 A` from 0, which is the anchor: where it starts is of no
        matter for a strongly convex problem. With :math:`\rho = G + C` and the Gram matrix
        :math:`\hat K`, over l2, the gradient is :math:`X^\top \rho` and the step
        :math:`\Delta C = \hat S \hat K \rho - \rho`, :math:`\hat S` that of `OutputLoss.inverse`.
        Near the minimum a step of movement :math:`\omega` leaves one of :math:`\omega^2 / 2`: the
        last digit costs one more step.
        """
        problem, strength, center = self.problem, self.quadratic.strength, self.quadratic.center
        if strength == 0.0 or problem.x.shape[1] > MOST_SAMPLES:
            return None
        gram, goal = problem.gram(), problem.goal
        kernel = gram / strength
        base = gram.new_zeros(*gram.shape[:2], problem.weight[0])
        if center is not None:
            base = problem.outputs(center.expand_as(self.point))
        c, outputs, last, inverse = torch.zeros_like(base), base, math.inf, None
        movements: list[Tensor] = []
        least: float | Tensor = math.inf if center is None else 0.0
        for _ in range(_MOST_STEPS if base.numel() else 0):
            loss = problem.loss.moved(outputs)
            if inverse is None or last > _NEAR:  # near enough the last one does
                inverse = loss.inverse(kernel, alike=not movements and center is None)
            rho = loss.gradient + c
            change = inverse(torch.bmm(kernel, rho)).sub_(rho)
            move = torch.bmm(kernel, change)
            omega = loss.movement(vector_norm(move, dim=2).amax(1))
            movements.append(omega)
            largest = float(omega) if len(omega) == 1 else float(omega.max())
            if not largest <= 1.75:  # below it a whole step lowers the objective for certain
                falls = omega < 0.75 * least  # a few times only, since it cannot fall for ever
                least = torch.where(falls, omega, least)
                if not bool(falls.all()):
                    change, move = _shortened(loss, c, base, change, move, rho, omega, falls)
            c, outputs = c + change, outputs + move
            small = largest < _NEAR and 0.5 * largest * max(largest, last) <= goal
            if small or largest < 1e-3 and largest > 0.5 * last or math.isnan(largest):
                break  # solved; at rounding's floor; lost
            last = largest
        point = problem.in_phi(c / strength)
        there = LinearHeads(problem, point if center is None else point + center)
        there.solved = there.is_bound = True
        long = torch.stack(movements) > _NEAR if movements else gram.new_zeros(0, len(gram))
        there.steps = (long.sum(0) + 1).clamp_max_(len(movements)).tolist()
        there._factored = gram, inverse
        there.loss = problem.loss.moved(outputs)
        there._rho = there.loss.gradient + c
        return there

    def solve(self, b: Tensor, damping: float) -> LinearSolution:
        r"""``(H + damping I) v = b`` by the minimum's factor and refinements, shapes ``[T, n]``.

        :math:`v = (b - X^\top q) / \mu` with :math:`q = S X v`, which solves
        :math:`(S^{-1} + K / \mu) q = X b / \mu`; :math:`\mu` is l2 plus the damping. A factor from
        one step before the minimum, or without the damping, is as good: refinements see to that.
        """
        problem, mu = self.problem, self.quadratic.strength + damping
        if self._factored is None:
            return conjugate_gradient(System(self.hvp, damping), b, 1000, 1e-10)
        gram, inverse = self._factored
        kernel = gram / mu
        if inverse is None or damping:
            inverse = self.loss.inverse(kernel)
        b_norm = vector_norm(b, dim=1)
        right = problem.outputs(b) / mu
        q, best, goal = inverse(right), math.inf, problem.goal
        for _ in range(_MOST_REFINEMENTS):
            residual = q - self.loss.curve(torch.baddbmm(right, kernel, q, alpha=-1.0))
            k_residual = torch.bmm(kernel, residual)
            size = (residual * k_residual).sum((1, 2)).mul_(mu).clamp_min_(0.0).sqrt_()
            relative = size / b_norm.clamp_min(_TINY)
            largest = float(relative.max())
            if largest <= goal or not largest < 0.5 * best:
                break
            best, q = largest, q - residual + inverse(k_residual)
        v = (b - problem.in_phi(q)).div_(mu)
        steps, reasons = torch.zeros_like(relative, dtype=torch.long), [solution.FACTORED] * len(b)
        if not (math.isfinite(largest + float(v.sum())) and float(b_norm.min()) > 0.0):
            good = v.sum(1).isfinite() & relative.isfinite()
            kinds = solution.NON_FINITE, solution.FACTORED, solution.ZERO
            reasons = [kinds[i] for i in torch.where(good, 1 + (b_norm == 0.0), 0).tolist()]
            v, q = (torch.where(good.view(-1, *[1] * (t.dim() - 1)), t, 0.0) for t in (v, q))
            relative = torch.where(good, relative, torch.inf)
        return LinearSolution(v, steps, relative, reasons, q)

    # How wrong the hypergradient is; a bound at the minimum, else an estimate: sums may cancel.

    def scales(self) -> tuple[Tensor, ...]:
        m, outputs = self.problem.x.shape[1], self.loss.outputs.abs()
        if self._factored is not None:
            squares = self._factored[0].diagonal(dim1=1, dim2=2)
        else:
            squares = self.problem.x.square().sum(-1) + float(self.problem.bias)
        if not m:
            return (squares.sum(1),) * 6
        longest, largest = squares.amax(1).sqrt(), outputs.amax((1, 2))
        curvature = longest.square() * (m * self.problem.loss.scale)
        relative, absolute = self.loss.noise(largest)
        strength = self.quadratic.strength
        convexity = torch.full_like(longest, strength) if strength > 0.0 else self._convexity()
        return longest, self.loss.movement(longest), relative, absolute, curvature, convexity

    def _convexity(self) -> Tensor:
        """How strongly each loss is curved at least where its features reach at all, ``[T]``."""
        x = self.problem.rows()
        values = torch.linalg.svdvals(x)
        floor = values[:, :1] * (max(x.shape[1:]) * torch.finfo(x.dtype).eps)
        smallest = torch.where(values > floor, values, math.inf).amin(1)
        return smallest.square() * self.loss.least_curvature()

    def errors(self, sizes: Sizes, damping: float, eps: float) -> tuple[float, float, float]:
        r"""Bounds where `solved`: the minimum is within :math:`\|\nabla g\| / \mu`, and no sample's
        outputs move by more than the longest sample times that; within a movement :math:`\omega` of
        it b, H and the mixed derivative each stay within factors :math:`e^{\pm\omega}`. phi and b
        are rounded: the outputs by :math:`\epsilon` times their own size, b by what that makes of
        it, and what of it lies beyond the span is divided by :math:`\mu`; the factor is float64's,
        of a matrix with the condition number :math:`1 + L / \mu`. Without l2 :math:`\mu` is that of
        the features' span, and the whole an estimate."""
        longest, movement, relative, absolute, curvature, strength = sizes.scales
        if strength == 0.0 or math.isinf(strength):  # nothing is curved: no features, or none apart
            return super().errors(sizes._replace(scales=(0.0,)), damping, eps)
        omega = 3.0 * movement * sizes.gradient / strength
        inner = math.expm1(min(omega, 700.0)) if omega == omega else math.inf
        if longest == 0.0:  # the samples' outputs say nothing of the query's
            inner = super().errors(sizes._replace(scales=(0.0,)), damping, eps)[0]
        amplified = sizes.b / max((strength + damping) * sizes.v, _TINY)
        noise = 1.0 + relative + longest * absolute / max(sizes.b, _TINY)
        rounding = eps + 0.4 * eps * amplified * noise
        rounding += 8.0 * torch.finfo(torch.float64).eps * (1.0 + curvature / strength)
        return inner, sizes.linear_error(strength + damping), rounding


def _shortened(
    loss: OutputLoss, c: Tensor, base: Tensor, change: Tensor, move: Tensor, rho: Tensor,
    omega: Tensor, whole: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    r"""What to take of a long step: all where ``whole``, or it lowers the objective enough.

    Else the best of a few shares, one of which, :math:`\ln(1 + \omega) / \omega`, is sure to
    lower it: the Hessian changes by at most :math:`e^{\omega}` there (Sun, Tran-Dinh 2019).
    """
    outputs = loss.outputs

    def objective(c: Tensor, outputs: Tensor) -> Tensor:
        penalty = (c * (outputs - base)).sum((-2, -1))
        return loss.value(outputs).add_(penalty, alpha=0.5)

    now, slope = objective(c, outputs), (rho * move).sum((1, 2))
    enough = whole | (objective(c + change, outputs + move) <= now + 1e-4 * slope)
    if bool(enough.all()):
        return change, move
    sure = torch.where(omega.isfinite(), torch.log1p(omega) / omega, 0.0)
    halves = torch.exp2(-torch.arange(12.0, dtype=c.dtype, device=c.device))
    shares = torch.cat([halves.unsqueeze(1).expand(-1, len(omega)), sure.unsqueeze(0)])
    each = shares.unsqueeze(2).unsqueeze(3)
    values = objective(c + each * change, outputs + each * move).nan_to_num(nan=math.inf)
    best = shares.gather(0, values.argmin(0, keepdim=True))[0]
    share = torch.where(enough, 1.0, best).view(-1, 1, 1)
    return share * change, share * move
