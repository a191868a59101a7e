"""The inner objective at one point: its gradient, and the two products that eq. (8) needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import grad
from torch.autograd.graph import GradientEdge

from l2l_implicit import checks
from l2l_implicit.inner_problem.boundary import is_boundary
from l2l_implicit.inner_problem.regularizer import SquaredDistance
from l2l_implicit.linear_solvers.solution import LinearSolution, LinearSolver
from l2l_implicit.vectors import flatten, unflatten

Products = list[Tensor | None]


class Linearization(ABC):
    r"""The inner objective :math:`g = \text{loss} + R` at one point :math:`(\theta, \phi)`.

    Args:
        parameters: phi, the tensors the loss was computed from.
        loss: its value, or what computes it.
        gradient: its gradient in phi, shape ``[n]``, detached.
        quadratic: R in closed form, or None if the loss holds it already.
        point: phi as one vector, if at hand.

    Attributes:
        point: phi as one vector, shape ``[n]``, detached.
        gradient: of g at ``point``, shape ``[n]``, detached.
        gradient_norm: its Euclidean norm.
        differentiable: whether there are products; without them there are value and gradient.
        closed_form: whether it took no autograd, so that another one costs next to nothing.
        elsewhere: g and its gradient at other points ``[n]``, where a closure can compute them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitCGHead, Linearization
        >>> class Damped(ImplicitCGHead):
        ...     def inner_step(self, at: Linearization) -> torch.Tensor:
        ...         curvature = at.gradient.dot(at.hvp(at.gradient)) / at.gradient_norm**2
        ...         return at.point - at.gradient / (2 * curvature)
        >>> learner, loss = Damped(nn.Linear(10, 5), lr=0.1).clone(), nn.CrossEntropyLoss()
        >>> h, y = torch.randn(25, 10), torch.arange(25) % 5
        >>> learner.adapt(lambda: loss(learner(h), y), steps=20)
        >>> learner.module.weight.shape
        torch.Size([5, 10])
    """

    differentiable = True
    closed_form = False
    elsewhere: Callable[[Tensor], tuple[float, Tensor]] | None = None

    def __init__(
        self,
        parameters: Sequence[Tensor],
        loss: float | Callable[[], float],
        gradient: Tensor,
        quadratic: SquaredDistance | None,
        point: Tensor | None = None,
    ) -> None:
        self.parameters = parameters
        self.point = flatten(p.detach() for p in parameters) if point is None else point
        self._loss, self._quadratic = loss, quadratic
        self.gradient = gradient
        if quadratic is not None:
            self.gradient = quadratic.add_gradient(gradient, self.point)
        self.gradient_norm = math.sqrt(float(self.gradient.dot(self.gradient)))

    @property
    def objective(self) -> float:
        """The value of g."""
        regularizer = self._quadratic.value(self.point) if self._quadratic else 0.0
        return (self._loss() if callable(self._loss) else self._loss) + regularizer

    def hvp(self, vector: Tensor) -> Tensor:
        r"""Hessian-vector product :math:`\nabla^2_\phi g \, p`, shapes ``[n] -> [n]``.

        References:
            Yang et al. (2025), Subroutine 1, line 5.
        """
        product = self.loss_hvp(vector)
        return product if self._quadratic is None else self._quadratic.add_hvp(product, vector)

    def solve(self, b: Tensor, solver: LinearSolver, start: Tensor | None = None) -> LinearSolution:
        r"""Solve :math:`\nabla^2_\phi g \, v = b`, shapes ``[n]``, by ``solver``.

        Args:
            b: the right-hand side.
            solver: maps matvec, right-hand side and start to a solution; the system that it gets
                may be smaller than this one and equivalent to it.
            start: a first guess.
        """
        return solver(self.hvp, b, start)

    def newton_direction(self) -> Tensor | None:
        """The solution of ``H s = -gradient``, shape ``[n]``, if it is cheap; else None."""
        return None

    def evaluate(self, point: Tensor) -> tuple[float, Tensor]:
        """g and its gradient at another ``point``, both shapes ``[n]``.

        Raises:
            RuntimeError: if the loss can not be computed again.
        """
        if self.elsewhere is None:
            raise RuntimeError(
                "adapt: expected a loss that can be computed again at other parameters, as "
                "step='lbfgs' needs it, got a tensor that is no cross-entropy or squared error of "
                "a linear head; use adapt(closure, steps=K)"
            )
        return self.elsewhere(point)

    def sources(self) -> list[Tensor]:
        """The tensors of theta that g depends on, in the order of `mixed_vjp`."""
        return self.loss_sources() + ([] if self._quadratic is None else self._quadratic.sources())

    def mixed_vjp(self, vector: Tensor) -> Products:
        r"""Mixed products :math:`\nabla^2_{\theta\phi} g \, v`, one for each of `sources`.

        References:
            Yang et al. (2025), eq. (8), and Algorithm 1, line 11 (misprinted there).
        """
        products = self.loss_mixed_vjp(vector)
        if self._quadratic is not None:
            products += self._quadratic.mixed_vjp(self.point, vector)
        return products

    def regularizer_norm(self) -> float:
        """Norm of the closed-form regulariser's gradient; 0 where the loss carries it."""
        if self._quadratic is None:
            return 0.0
        zero = torch.zeros_like(self.point)
        return float(self._quadratic.add_gradient(zero, self.point).norm())

    @abstractmethod
    def loss_hvp(self, vector: Tensor) -> Tensor:
        """The loss's part of `hvp`."""

    @abstractmethod
    def loss_sources(self) -> list[Tensor]:
        """The loss's part of `sources`."""

    @abstractmethod
    def loss_mixed_vjp(self, vector: Tensor) -> Products:
        """The loss's part of `mixed_vjp`."""


class AutogradLinearization(Linearization):
    """For any loss: its gradient is kept as a graph, both products are backward passes of it.

    Args:
        loss: the inner objective as far as autograd carries it, a scalar.
        parameters: phi.
        quadratic: as in `Linearization`.
        anchor: the anchor's tensors where ``loss`` holds the regulariser, else empty.
        stand_ins: the leaves that stand for them in ``loss``, so that phi at its start and the
            anchor, often one tensor, stay two arguments.
        unused: let parameters be absent from ``loss``; their loss gradient is zero.
        differentiable: keep the graph; without it there are no products.
    """

    def __init__(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        *,
        quadratic: SquaredDistance | None = None,
        anchor: Sequence[Tensor] = (),
        stand_ins: Sequence[Tensor] = (),
        unused: bool = False,
        differentiable: bool = True,
    ) -> None:
        gradients = inner_gradient(loss, parameters, unused, create_graph=differentiable)
        dense = flatten(g.detach() for g in _dense(gradients, parameters))
        super().__init__(parameters, float(loss.detach()), dense, quadratic)
        self.differentiable = differentiable
        if differentiable:
            kept = [(g, i) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
            self._gradients, self._kept = [g for g, _ in kept], [i for _, i in kept]
            self._anchor, self._stand_ins = list(anchor), list(stand_ins)
            self._inputs = find_meta_inputs(loss, [*parameters, *stand_ins])

    def loss_hvp(self, vector: Tensor) -> Tensor:
        return flatten(_dense(self._vjp(self.parameters, vector), self.parameters))

    def loss_sources(self) -> list[Tensor]:
        marked = [node.saved_tensors[0] for node in self._inputs.boundaries]
        return [*marked, *self._inputs.leaves, *self._anchor]

    def loss_mixed_vjp(self, vector: Tensor) -> Products:
        edges = [GradientEdge(node, 0) for node in self._inputs.boundaries]
        through_features = self._vjp(edges, vector)
        through_leaves = self._direct_vjp(vector) if self._inputs.leaves else []
        return [*through_features, *through_leaves, *self._vjp(self._stand_ins, vector)]

    def _vjp(self, inputs: Sequence[Any], vector: Tensor) -> Sequence[Tensor | None]:
        """The kept gradient's product with ``vector``, with respect to ``inputs``."""
        if not inputs or not self._gradients:
            return [None] * len(inputs)
        pieces = unflatten(vector, self.parameters)
        return grad(
            self._gradients,
            inputs,
            [pieces[i] for i in self._kept],
            retain_graph=True,
            allow_unused=True,
        )

    def _direct_vjp(self, vector: Tensor) -> Sequence[Tensor | None]:
        """Products with leaves used directly; what reaches them by another way is cut off there."""
        hooks = [node.register_prehook(_stop) for node in self._inputs.boundaries]
        hooks += [p.register_hook(torch.zeros_like) for p in self.parameters if not p.is_leaf]
        try:
            return self._vjp(self._inputs.leaves, vector)
        finally:
            for hook in hooks:
                hook.remove()


class MetaInputs(NamedTuple):
    """Where theta enters an inner objective: marked boundaries, and leaves used directly."""

    boundaries: list[Any]
    leaves: list[Tensor]


def find_meta_inputs(objective: Tensor, inner: Sequence[Tensor]) -> MetaInputs:
    """Walk the objective's graph down to theta, stopping at phi and at the boundaries.

    Args:
        objective: the inner objective, after its gradient in ``inner`` was taken (by then the
            boundaries that lie downstream of phi have said so).
        inner: tensors to pass over: phi itself, and stand-ins that are accounted for elsewhere.
    """
    known = {id(tensor) for tensor in inner}
    seen = {tensor.grad_fn for tensor in inner if tensor.grad_fn is not None}
    found, stack = MetaInputs([], []), [cast(Any, objective.grad_fn)]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if is_boundary(node):
            found.boundaries.append(node)
        elif type(node).__name__ != "AccumulateGrad":
            stack.extend(child for child, _ in node.next_functions)
        elif id(node.variable) not in known:
            found.leaves.append(node.variable)
    return found


def inner_gradient(
    loss: Tensor, parameters: Sequence[Tensor], unused: bool, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """The loss's gradients in ``parameters``; None for an unused one, where that is allowed."""
    gradients = grad(loss, parameters, create_graph=create_graph, allow_unused=True)
    checks.used(gradients, unused)
    return gradients


def _stop(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A node's incoming gradients, as zeros."""
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)


def _dense(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with zeros where there was none."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, like, strict=True)]
