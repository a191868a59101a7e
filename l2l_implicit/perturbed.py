r"""The hypergradient as the derivative of a perturbed inner problem: no second derivatives.

With :math:`b = \nabla_\phi f`, the inner problem tilted by b has a solution that moves with the
tilt, and what it does to the inner objective's own gradient in theta is the second term of eq. (8):

.. math:: \phi_\epsilon = \text{argmin}_\phi \; g(\theta, \phi) + \epsilon \langle b, \phi \rangle,
          \qquad v = - \frac{d \phi_\epsilon}{d \epsilon}, \qquad
          \nabla^2_{\theta\phi} g \, v
          = - \frac{d}{d \epsilon} \nabla_\theta g(\theta, \phi_\epsilon).

Both derivatives are differences of two (or of more) solutions. A gradient is all they need.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.linalg import vector_norm

from l2l_implicit import checks
from l2l_implicit.implicit_diff import SavedLinearization
from l2l_implicit.inner_problem.linear_heads import LinearHeads
from l2l_implicit.inner_problem.linearization import FirstDerivatives, Linearization, Products
from l2l_implicit.inner_solvers.protocol import descend
from l2l_implicit.linear_solvers import solution
from l2l_implicit.linear_solvers.solution import LinearSolution, dot
from l2l_implicit.vectors import RandomState, buffers_apart, substitute

if TYPE_CHECKING:
    from l2l_implicit.learner import ImplicitCGHead

# A move is as long as it was to be up to a factor; phi's entries count as at least so large; what
# is measured of an answer is not to exceed its tolerance by more than a factor.
_NEAR, _LEAST, _INEXACT = 4.0, 1e-3, 10.0


@dataclass(frozen=True)
class Perturbed:
    r"""In place of a linear solver: the inner problem is solved again, tilted by b.

    No operation is differentiated twice, so any module will do that has a gradient: fused
    attention, recurrent layers of cuDNN, a ``once_differentiable`` function. The closure given to
    ``adapt`` is called again in ``backward()``, at other parameters: buffers and random numbers
    are what they were at its last call, and afterwards as if nothing had happened. A loss tensor
    will do for a linear head's cross-entropy or squared error only. The inner solver may take first
    derivatives alone too: ``LBFGS()``, ``GradientDescent()``.

    What the inner solver had left of the gradient is part of the tilt: so an inner problem that is
    not solved makes no error but the one that it makes in eq. (8) too.

    Args:
        symmetric: take the difference of two solutions, tilted by b and by -b: its error falls with
            the square of the step. The second starts at the first one's mirror image. Otherwise
            the difference to phi itself, whose error falls with the step.
        step: how far phi is to move, relative to its own length. None: where rounding and
            curvature cost about the same, the cube root of the precision's epsilon for a
            symmetric difference, the square root for the other.
        steps: the most inner steps of each solve.
        tol: it ends once the tilted problem's gradient is ``tol`` times its first.
        damping: added to the diagonal of the system.

    References:
        FO-B-MAML: A New First-Order Meta-Learning Algorithm with Convergence Guarantees (2026),
        openreview.net/forum?id=4zGAXQxisB, which tilts by the query loss itself (to first order
        the same); Zucchet et al. (2022), A contrastive rule for meta-learning.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import LBFGS, ImplicitMAML, Perturbed
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> maml = ImplicitMAML(net, lr=0.1, inner=LBFGS(), linear=Perturbed())
        >>> x, y, loss = torch.randn(9, 8), torch.arange(9) % 3, nn.CrossEntropyLoss()
        >>> learner = maml.clone()
        >>> learner.adapt(lambda: loss(learner(x), y), steps=50)
        >>> loss(learner(x), y.roll(1)).backward()
        >>> net[0].weight.grad.shape, maml.diagnostics.unsolved
        (torch.Size([16, 8]), 0)
    """

    symmetric: bool = True
    step: float | None = None
    steps: int = 100
    tol: float = 1e-4
    damping: float = 0.0

    def __post_init__(self) -> None:
        checks.count("Perturbed: steps", self.steps)
        checks.positive("Perturbed: tol", self.tol)
        checks.not_negative("Perturbed: damping", self.damping)
        if self.step is not None:
            checks.positive("Perturbed: step", self.step)

    def respond(
        self, learner: ImplicitCGHead, at: LinearHeads | FirstDerivatives, b: Tensor,
        start: Tensor | None = None,
    ) -> LinearSolution:  # fmt: skip
        """The solutions v and their mixed products.

        Args:
            learner: whose inner solver solves the tilted problems.
            at: the inner objectives of T tasks at phi, with their gradients elsewhere.
            b: the query losses' gradients in phi, shape ``[T, n]``.
            start: a first guess of v.
        """
        b_norm = vector_norm(b, dim=1)
        lost, zero = ~b_norm.isfinite(), b_norm == 0
        idle = lost | zero
        unit = torch.where(idle, 1.0, b_norm).unsqueeze(1)
        response = _Response(self, learner, at, torch.where(idle.unsqueeze(1), 0.0, b / unit))
        if not bool(idle.all()):
            response.find(None if start is None else start / unit)
        v = torch.where(idle.unsqueeze(1), 0.0, response.v * unit)
        products = _times(response.products, torch.where(idle, 0.0, unit.squeeze(1)))
        pairs = zip(products, at.sources(), strict=False)
        products = [None if p is None else _like(p, source) for p, source in pairs]
        residual, error = (
            torch.where(idle, 0.0, found) for found in (response.residual, response.error)
        )
        bad = torch.maximum(residual, error) > _INEXACT * self.tol
        rows = zip(lost.tolist(), zero.tolist(), bad.tolist(), response.reasons, strict=True)
        return LinearSolution(
            v, torch.full_like(zero, response.calls, dtype=torch.long), residual,
            [_reason(*row) for row in rows],
            products=products + at.quadratic.mixed_vjp(at.point, v), products_error=error,
        )  # fmt: skip


def _reason(lost: bool, zero: bool, bad: bool, ended: str) -> str:
    if lost or zero:
        return solution.NON_FINITE if lost else solution.ZERO
    return solution.INEXACT if bad and ended == solution.CONVERGED else ended


class _Response:
    """How phi answers tilts of length 1, or 0; ``[T]`` is a number of each task.

    Attributes:
        b: the tilts, shape ``[T, n]``.
        v: the solutions, ``[T, n]``.
        products: mixed products with v, without what the regulariser has in closed form.
        residual: ``norm(b - A v)``, measured, ``[T]``.
        error: of the products, relative, measured, ``[T]``.
        reasons: why each task's solver ended.
        calls: evaluations of the gradient.
    """

    def __init__(
        self, settings: Perturbed, learner: ImplicitCGHead, at: LinearHeads | FirstDerivatives,
        b: Tensor,
    ) -> None:  # fmt: skip
        self.settings, self.learner, self.at, self.b = settings, learner, at, b
        self.v, self.residual, self.error = torch.zeros_like(b), *b.new_zeros(2, len(b))
        self.products: Products = [None] * (len(at.sources()) - len(at.quadratic.sources()))
        self.reasons, self.calls = [solution.CONVERGED] * len(b), 0

    def find(self, start: Tensor | None) -> None:
        """Solve, and measure with half the step how well; ``start`` is a first guess of v."""
        origin, both = self.at.point, self.settings.symmetric
        here = self._gradients(origin)
        self.left = here[0]  # by the inner solver: a tilt that is there already
        step = self.settings.step or torch.finfo(origin.dtype).eps ** (1 / 3 if both else 1 / 2)
        length = vector_norm(origin, dim=1).clamp_min(_LEAST * origin.shape[1] ** 0.5)
        size, low = self._solve_for(step * length, start)
        high = self._solve(-size, 2.0 * origin - low) if both else origin
        width = 2.0 * size if both else size
        self.v = (high - low) / width.unsqueeze(1)
        in_theta = self._gradients(high)[1] if both else here[1]
        self.products = _slope(in_theta, self._gradients(low)[1], width)

        aside, width = 0.5 * size.unsqueeze(1) * self.v, 0.5 * width
        before, after = (
            self._gradients(origin - aside), self._gradients(origin + aside) if both else here
        )  # fmt: skip
        product = (after[0] - before[0]) / width.unsqueeze(1) + self.settings.damping * self.v
        again = _slope(after[1], before[1], width)
        factor = 4 / 3 if both else 2.0  # Richardson's, for an error of the second, the first order
        self.residual = factor * vector_norm(self.b - product, dim=1)
        self.error = factor * _distance(self.products, again, len(self.b))

    def _solve_for(self, reach: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sizes of tilts that move phi about as far as ``reach``, ``[T]``, and where to."""
        origin = self.at.point
        size, ahead = self._guess(reach, start)
        low = self._solve(size, ahead)
        moved = vector_norm(low - origin, dim=1)
        off = ((moved > _NEAR * reach) | (moved * _NEAR < reach)) & (moved > 0.0)
        if bool(off.any()):
            share = torch.where(off, reach / moved, 1.0)
            size = size * share
            low = self._solve(size, origin + (low - origin) * share.unsqueeze(1))
        return size, low

    def _guess(self, reach: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same, before anything is solved."""
        origin, damping = self.at.point, self.settings.damping
        if start is not None:
            size = reach / vector_norm(start, dim=1)
            ahead = origin - size.unsqueeze(1) * start
            product = (self.left - self._gradient(ahead)) / size.unsqueeze(1) + damping * start
            if bool((vector_norm(self.b - product, dim=1) <= vector_norm(self.b, dim=1)).all()):
                return size, ahead
        # v is at least as long as 1 over the curvature along b.
        bend = self._gradient(origin + reach.unsqueeze(1) * self.b) - self.left
        curvature = dot(self.b, bend).abs() / reach + damping
        return reach * curvature.clamp_min(
            max(self.at.quadratic.strength, torch.finfo(origin.dtype).tiny)
        ), origin

    def _solve(self, size: Tensor, ahead: Tensor) -> Tensor:
        """The solutions under tilts of ``size``, ``[T]``, from ``ahead`` on, shapes ``[T, n]``."""
        at, learner, damping = self.at, self.learner, self.settings.damping
        slope = size.unsqueeze(1) * self.b
        solve = learner._plain("inner_step") and getattr(learner.inner, "solve_heads", None)
        if isinstance(at, LinearHeads) and solve and at.quadratic.strength + damping > 0.0:
            there = solve(at.tilted(slope - self.left, damping), self.settings.steps, learner.lr)
            if there is not None:
                return there.point
        points = []
        for t, goal in enumerate((self.settings.tol * size.abs()).tolist()):
            one = at if len(size) == 1 else cast(LinearHeads, at).task(t)
            own = slice(t, t + 1)
            tilt = at.point[own], self.left[own], slope[own], damping
            point, self.reasons[t] = self._solve_one(one, tilt, goal, ahead[own])
            points.append(point)
        return torch.cat(points)

    def _solve_one(
        self, at: LinearHeads | FirstDerivatives, tilt: _Tilt, goal: float, ahead: Tensor
    ) -> tuple[Tensor, str]:
        """One task, by the learner's inner solver: where it ended, and why."""
        learner, reason = self.learner, solution.MAX_STEPS
        since: Tilted | None = None
        learner._task.step = None  # another problem

        def linearize(point: Tensor, _: bool = False) -> Tilted:
            self.calls += 1
            return Tilted(at.moved(point), *tilt, since)

        def evaluate(point: Tensor) -> tuple[Tensor, Tensor]:
            there = linearize(point)
            return there.objective, there.gradient

        def step(there: Linearization) -> Tensor:
            nonlocal reason, since
            if float(there.gradient_norm) <= goal:
                return there.point
            since = cast(Tilted, there)
            point = learner.inner_step(there)
            if point is not there.point:
                return point.detach()
            reason = solution.STALLED
            return point

        limits: Any = {"steps": self.settings.steps, "hvp": False, "keep": False}
        end = descend(linearize, evaluate, step, lambda: ahead, **limits)
        return end.point, solution.CONVERGED if float(end.gradient_norm) <= goal else reason

    def _gradient(self, point: Tensor) -> Tensor:
        self.calls += 1
        return self.at.moved(point).gradient

    def _gradients(self, point: Tensor) -> tuple[Tensor, Products]:
        self.calls += 1
        return self.at.gradients(point)


_Tilt = tuple[Tensor, Tensor, Tensor, float]


class Tilted(Linearization):
    """``base`` plus ``<slope - left, phi - origin> + damping/2 |phi - origin|^2``, T = 1.

    Its values are sums of differences, each by the trapezoidal rule from the gradients at both
    ends: the objective's own would differ in their last digits only.

    Args:
        left: the gradient at ``origin`` without the tilt; ``slope`` is the one with it. ``[1, n]``.
        since: the point of the step before and the gradient and value there; None at the origin.
    """

    def __init__(
        self, base: Linearization, origin: Tensor, left: Tensor, slope: Tensor, damping: float,
        since: Tilted | None,
    ) -> None:  # fmt: skip
        self.point, self.quadratic = base.point, base.quadratic
        self._base, self._damping, move = base, damping, base.point - origin
        self.gradient = (base.gradient - left).add_(move, alpha=damping) + slope
        value = torch.zeros_like(move[:, 0])
        if since is not None:
            value, slope, move = since.objective, since.gradient, base.point - since.point
        self.objective = value + 0.5 * dot(self.gradient + slope, move)

    def hvp(self, vector: Tensor) -> Tensor:
        return self._base.hvp(vector).add(vector, alpha=self._damping)

    def regularizer_norm(self) -> Tensor:
        """None: the tilt, and not the regulariser, is the measure of what is left."""
        return torch.zeros_like(self.gradient[:, 0])

    def sources(self) -> list[Tensor]:
        return self._base.sources()

    def mixed_vjp(self, answer: LinearSolution) -> Products:
        return self._base.mixed_vjp(answer)


# Lists of products, of which some may be None; a factor [T] is of the first dimension where T > 1.


def _times(products: Products, factor: Tensor) -> Products:
    each = factor if len(factor) == 1 else factor.view(-1, 1, 1)
    return [None if p is None else p * each for p in products]


def _slope(high: Products, low: Products, width: Tensor) -> Products:
    pairs = zip(high, low, strict=True)
    moved = [None if h is None or w is None else h - w for h, w in pairs]
    return _times(moved, 1.0 / width)


def _distance(products: Products, others: Products, tasks: int) -> Tensor:
    """Of all of a task's products to the others, relative, ``[T]``; 0 where there are none."""
    moved, size = torch.zeros(2, tasks, dtype=torch.float64).unbind()
    for p, o in zip(products, others, strict=True):
        if p is not None and o is not None:
            moved = moved + (p - o).double().reshape(tasks, -1).square().sum(1).cpu()
            size = size + p.double().reshape(tasks, -1).square().sum(1).cpu()
    return torch.where(moved > 0.0, (moved / size).sqrt(), 0.0)


def _like(product: Tensor, source: Tensor) -> Tensor:
    """In the source's shape; autograd rounds it to half precision."""
    return product.to(torch.promote_types(source.dtype, torch.float32)).view(source.shape)


# The closure, called again in the backward pass.


class Again:
    """A closure's inner objective, evaluated again when the hypergradient is asked for.

    The closure holds its learner, the learner phi, and phi its graph. If the graph held the
    closure, nothing of it would ever be freed; so it holds this object weakly. The learner holds
    it, and so does what the learner computes. When the graph lets go of its linearization, this
    object lets go of the closure.

    Args:
        objective: the closure's, which can `linearize` at a point, and holds the tensors that the
            module has now, ``phi``.
        module, phi: the learner's, and the adapted parameters in it.
        saved: the linearization, as long as the graph needs it.
        random: the state of the random numbers before the closure's last call.
    """

    def __init__(
        self, objective: Any, module: nn.Module, phi: Sequence[Tensor], saved: SavedLinearization,
        random: RandomState,
    ) -> None:  # fmt: skip
        self._objective, self._module, self._phi = objective, module, phi
        self._random, this = random, weakref.ref(self)

        def end(_: object) -> None:
            if (again := this()) is not None:
                again._objective, again._phi = None, ()

        self._saved = weakref.ref(saved, end)

    def __call__(self, point: Tensor, in_theta: bool) -> Any:
        """The linearization at ``point``; everything else is left as it was."""
        objective = self._objective
        objective.phi = now = [p for p in self._module.parameters() if p.requires_grad]
        try:
            with torch.enable_grad(), buffers_apart(self._module), self._random.again():
                return objective.linearize(point, in_theta)
        finally:
            substitute(self._module, objective.phi, now)

    def forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The module's output, which holds this object if it is that of the adapted parameters."""
        phi = self._phi
        mine = [p for p in module.parameters() if p.requires_grad]
        if not phi or not torch.is_grad_enabled() or any(map(operator.is_not, mine, phi)):
            return module(*args, **kwargs)
        held = _Held.apply(self, *phi)
        substitute(module, phi, held)
        try:
            return module(*args, **kwargs)
        finally:
            substitute(module, held, phi)


class _Held(Function):
    """Tensors as they are, whose graph holds an object."""

    @staticmethod
    def forward(ctx: Any, held: object, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.held = held
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *gradients
