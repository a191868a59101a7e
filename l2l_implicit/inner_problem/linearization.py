"""The inner objective at one point: its gradient, and the two products that eq. (8) needs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad
from torch.linalg import vector_norm

from l2l_implicit import checks
from l2l_implicit.inner_problem import refusals
from l2l_implicit.inner_problem.boundary import find_meta_inputs
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec
from l2l_implicit.vectors import flatten, unflatten

Products = list[Tensor | None]
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]


class SquaredDistance:
    r"""The regulariser :math:`R(\phi) = (l_2/2) \|\phi - a\|^2` of T tasks and its derivatives.

    Args:
        l2: its coefficient, a float or a scalar tensor (part of theta if it requires grad).
        anchor: the tensors ``a``, in phi's shapes, empty for zero.
        dtype: what to compute in.
        tasks: the size T of their first dimension, if each task has an ``a`` of its own.

    Attributes:
        strength: the coefficient, R's curvature in every direction.
        center: ``a``, shape ``[1, n]``, or ``[T, n]`` of T tasks, detached; None for zero.
    """

    def __init__(
        self, l2: float | Tensor, anchor: Sequence[Tensor], dtype: torch.dtype, tasks: int = 1
    ) -> None:
        self._l2 = l2 if isinstance(l2, Tensor) and l2.requires_grad else None
        self._anchor, self.center = anchor, None
        if anchor:
            self.center = torch.cat([a.detach().reshape(tasks, -1) for a in anchor], 1).to(dtype)
        self.strength = l2.item() if isinstance(l2, Tensor) else float(l2)
        if not 0.0 <= self.strength < math.inf:
            checks.coefficient(l2)

    def same(self, other: SquaredDistance) -> bool:
        """Whether both are one function of phi and theta, at its present values."""
        if (self.strength, *map(id, self.sources())) != (other.strength, *map(id, other.sources())):
            return False
        return self.center is None or torch.equal(self.center, other.center)  # type: ignore[arg-type]

    def offset(self, point: Tensor) -> Tensor:
        """phi - a, shapes ``[T, n]``."""
        return point if self.center is None else point - self.center

    def value(self, point: Tensor) -> Tensor:
        """R at ``point``, ``[T, n] -> [T]``."""
        return 0.5 * self.strength * self.offset(point).square().sum(1)

    def sources(self) -> list[Tensor]:
        """The tensors of theta that R depends on: ``l2``, then the anchor."""
        return [*([] if self._l2 is None else [self._l2]), *self._anchor]

    def mixed_vjp(self, point: Tensor, vector: Tensor) -> list[Tensor | None]:
        """Mixed products with ``vector`` for each of `sources`, summed over tasks that share it."""
        products: list[Tensor | None] = []
        if self._l2 is not None:
            products.append((self.offset(point) * vector).sum().to(self._l2).view_as(self._l2))
        if self._anchor and self.center is not None:
            pull = vector if len(self.center) > 1 else vector.sum(0, keepdim=True)
            sizes = [a.numel() // len(pull) for a in self._anchor]
            pieces = pull.mul(-self.strength).to(self._anchor[0].dtype).split(sizes, 1)
            products += [p.reshape(a.shape) for p, a in zip(pieces, self._anchor, strict=True)]
        return products


class Sizes(NamedTuple):
    """Norms that the error of one task's hypergradient is made of."""

    gradient: float  # of the inner gradient where it was linearized
    first: float  # of the first one
    residual: float  # of the linear system, relative to b
    b: float  # of its right-hand side
    v: float  # of its solution
    scales: tuple[float, ...]  # what `Linearization.scales` has

    def linear_error(self, strength: float) -> float:
        """What the residual costs v where the matrix is at least ``strength`` times I."""
        if strength == 0.0 or self.residual == 0.0:
            return self.residual
        return self.residual * self.b / (strength * self.v) if self.v > 0.0 else math.inf


class Linearization(ABC):
    r"""The inner objectives :math:`g = \text{loss} + R` of T tasks at one point each.

    A module that autograd differentiates has T = 1; linear heads have any T.

    Attributes:
        point: phi, task by task, shape ``[T, n]``, detached.
        quadratic: R in closed form; zero if the loss holds it already.
        gradient, objective: of g at ``point``, ``[T, n]``, detached; its values, ``[T]``.
        differentiable: whether there are products; without them there are value and gradient.
        steps: each task's inner steps that led here, where the solver counts them itself.
        elsewhere: what `evaluate` asks, where something can compute them there.
        accuracy: the inner part of `errors` at which the learner ends the inner loop; a solver's
            own tolerance then stands idle. None: there is none.
        sizes: each task's norms, as far as they are known without a linear system, once measured.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitCGHead, Linearization
        >>> class Damped(ImplicitCGHead):
        ...     def inner_step(self, at: Linearization) -> torch.Tensor:
        ...         curvature = (at.gradient * at.hvp(at.gradient)).sum(1) / at.gradient_norm**2
        ...         return at.point - at.gradient / (2 * curvature.unsqueeze(1))
        >>> learner, h = Damped(nn.Linear(10, 5), lr=0.1).clone(), torch.randn(25, 10)
        >>> learner.adapt(lambda: learner(h).square().mean(), steps=20)
    """

    point: Tensor
    quadratic: SquaredDistance
    gradient: Tensor
    objective: Tensor
    differentiable = True
    steps: Sequence[int] | None = None
    elsewhere: Evaluate | None = None
    accuracy: float | None = None
    sizes: Sequence[Sizes] = ()

    @property
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of each task's gradient, shape ``[T]``."""
        return vector_norm(self.gradient, dim=1)

    @abstractmethod
    def hvp(self, vector: Tensor) -> Tensor:
        r"""Hessian-vector products :math:`\nabla^2_\phi g \, p`, shapes ``[T, n] -> [T, n]``.

        References:
            Yang et al. (2025), Subroutine 1, line 5.
        """

    @abstractmethod
    def sources(self) -> list[Tensor]:
        """The tensors of theta that g depends on, in the order of `mixed_vjp`."""

    @abstractmethod
    def mixed_vjp(self, answer: LinearSolution) -> Products:
        r"""Mixed products :math:`\nabla^2_{\theta\phi} g \, v`, one for each of `sources`.

        References:
            Yang et al. (2025), eq. (8), and Algorithm 1, line 11 (misprinted there).
        """

    def diagonal(self) -> Tensor | None:
        """The Hessian's diagonal, ``[T, n]``, where it is known without products."""
        return None

    def kronecker_inverse(self, shift: float) -> Matvec | None:
        """An approximate inverse of ``H + damping I`` where H has Kronecker factors."""
        return None

    def evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """g and its gradient at another ``point``, ``[T, n] -> [T], [T, n]``.

        Raises:
            RuntimeError: if the loss can not be computed again.
        """
        if self.elsewhere is None:
            raise RuntimeError(
                "adapt: expected a loss that can be computed again at other parameters, as "
                "inner=LBFGS() needs it, got a tensor that is no cross-entropy or squared error of "
                "a linear head; use adapt(closure, steps=K)"
            )
        return self.elsewhere(point)

    def regularizer_norm(self) -> Tensor:
        """Norm of the closed-form regulariser's gradient, ``[T]``; 0 where the loss carries it."""
        return self.quadratic.strength * vector_norm(self.quadratic.offset(self.point), dim=1)

    # How wrong the hypergradient is: docs/mathematics.md derives it and names the constants.

    is_bound = False

    def scales(self) -> tuple[Tensor, ...]:
        """What `errors` needs to know of the point, each ``[T]``."""
        least = torch.finfo(self.point.dtype).eps ** 0.5 * self.quadratic.strength
        least = least * vector_norm(self.point, dim=1)  # at the anchor the distance is rounding's
        return (torch.maximum(self.regularizer_norm(), least),)

    def errors(self, sizes: Sizes, damping: float, eps: float) -> tuple[float, float, float]:
        r"""How wrong one task's hypergradient may be, relative to its size; here an estimate.

        Args:
            sizes: of this task.
            damping: what the linear system has on its diagonal besides H.
            eps: rounding of phi as the user has it.

        Returns:
            Three parts. Of the inner minimum: :math:`\|\nabla g\| / \mu`, the distance where g is
            strongly convex with :math:`\mu = l_2`, relative to the distance from the anchor;
            without a closed-form regulariser the gradient relative to the first one. Of the linear
            system: :math:`\|r\| / (\mu \|v\|)` with its residual r, :math:`\mu` with the damping.
            Where v is longer than :math:`\|b\| / \mu`, some curvature is below :math:`\mu`, and
            :math:`\|b\| / \|v\|` takes its place in both. Of rounding: not known here.
        """
        strength = damping + self.quadratic.strength
        weaker = max(1.0, strength * sizes.v / sizes.b) if sizes.b > 0.0 else 1.0
        scale = sizes.scales[0] or sizes.first
        inner = sizes.gradient / scale if scale > 0.0 else sizes.gradient
        return inner * weaker, sizes.linear_error(strength) * weaker, 0.0


class AutogradLinearization(Linearization):
    """Of any loss, T = 1: its gradient is kept as a graph, both products are backward passes of it.

    Args:
        loss: the inner objective as far as autograd carries it, a scalar.
        parameters: phi, the tensors the loss was computed from.
        quadratic, differentiable: as in `Linearization`.
        anchor: the anchor's tensors where ``loss`` holds the regulariser, else empty.
        stand_ins: the leaves that stand for them in ``loss``, so that phi at its start and the
            anchor, often one tensor, stay two arguments.
        unused: let parameters be absent from ``loss``; their loss gradient is zero.
        keeps_second: keep the gradient's graph; without it the loss's alone, from which that is
            made anew for each product.
        retain: keep the loss's own graph, for its derivatives in theta.
    """

    def __init__(
        self, loss: Tensor, parameters: Sequence[Tensor], *,
        quadratic: SquaredDistance | None = None, anchor: Sequence[Tensor] = (),
        stand_ins: Sequence[Tensor] = (), unused: bool = False, differentiable: bool = True,
        keeps_second: bool = True, retain: bool = False,
    ) -> None:  # fmt: skip
        self.quadratic = quadratic or SquaredDistance(0.0, [], torch.float32)
        self.point = flatten(parameters).detach().unsqueeze(0)
        gradients = inner_gradient(
            loss, parameters, unused, create_graph=differentiable and keeps_second,
            retain_graph=differentiable or retain,
        )  # fmt: skip
        self.parameters, self.differentiable = parameters, differentiable
        self._value = loss.detach().view(1)
        self.loss_gradient = flat(gradients, parameters).detach()
        offset, strength = self.quadratic.offset(self.point), self.quadratic.strength
        self.gradient = self.loss_gradient.add(offset, alpha=strength)
        if differentiable:
            self._gradients: Sequence[Tensor | None] | None = gradients if keeps_second else None
        if differentiable or retain:
            self.loss, self._anchor, self._stand_ins = loss, list(anchor), list(stand_ins)
            self._inputs = find_meta_inputs(loss, [*parameters, *stand_ins])
            self.operations = self._inputs.names

    @property
    def needs_second(self) -> bool:
        """Whether a product comes from the gradient's graph."""
        return True

    @property
    def objective(self) -> Tensor:  # type: ignore[override]
        return self._value + self.quadratic.value(self.point)

    def hvp(self, vector: Tensor) -> Tensor:
        if not self.differentiable:
            raise RuntimeError(
                "inner solver: expected one of first derivatives, as linear=Perturbed() takes no "
                "others, got one that asks for a Hessian product (Newton() on this module, "
                "GradientDescent(adaptive=True)); use inner=LBFGS() or GradientDescent()"
            )
        return self.derivative(vector)

    def derivative(self, vector: Tensor) -> Tensor:
        """The gradient's derivative along ``vector``, whatever matrix `hvp` has in its place."""
        pieces = unflatten(vector[0], self.parameters)
        product = flat(pulled_back(self._graph(), self.parameters, pieces), self.parameters)
        return product.add_(vector, alpha=self.quadratic.strength)

    def sources(self) -> list[Tensor]:
        return [*self._inputs.sources(), *self._anchor, *self.quadratic.sources()]

    def mixed_vjp(self, answer: LinearSolution) -> Products:
        if self.needs_second:
            self._check_unchanged()
        own = self.quadratic.mixed_vjp(self.point, answer.solution)
        return self.mixed(answer.solution) + own

    def mixed(self, vector: Tensor) -> Products:
        """The derivatives of `in_theta` along ``vector``."""
        gradients = self._graph() if self.needs_second else ()
        pieces = unflatten(vector[0], self.parameters)
        product = partial(pulled_back, gradients, weights=pieces)
        return [*self._inputs.vjp(product, self.parameters), *product(self._stand_ins)]

    def in_theta(self) -> Products:
        r"""The loss's gradients :math:`\nabla_\theta g` at ``point``, one for each of `sources`
        but l2 and the anchor of the regulariser in closed form."""

        def gradients(inputs: Sequence[Any]) -> Sequence[Tensor | None]:
            if not inputs:
                return []
            return gradients_of(self.loss, inputs, retain_graph=True, allow_unused=True)

        return [*self._inputs.vjp(gradients, self.parameters), *gradients(self._stand_ins)]

    def _graph(self) -> Sequence[Tensor | None]:
        """The loss's gradient with its graph, as it was kept or made anew."""
        if self._gradients is not None:
            return self._gradients
        return gradients_of(self.loss, self.parameters, create_graph=True, allow_unused=True)

    def _check_unchanged(self) -> None:
        """Whether the graph still computes the gradient that it computed first.

        It does not where its data were changed without a trace (``.data``), and where it runs a
        part of the module again (activation checkpointing) after the weights have moved.
        """
        again = gradients_of(self.loss, self.parameters, retain_graph=True, allow_unused=True)
        now, before = flat(again, self.parameters), self.loss_gradient
        tol = torch.finfo(now.dtype).eps ** 0.5
        if not bool((now - before).norm() <= tol * before.norm()):
            raise RuntimeError(
                "backward: expected the inner loss as adapt() saw it, got another gradient when "
                "its graph was evaluated again: data or weights were changed in place (.data), or "
                "activation checkpointing ran a block with later weights; use "
                "adapt(closure, steps=K), and change data after backward()"
            )


class FirstDerivatives(AutogradLinearization):
    r"""Of any loss that can be computed again, T = 1: no second derivative is ever taken."""

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor], **settings: Any) -> None:
        super().__init__(loss, parameters, differentiable=False, retain=True, **settings)
        self._sources = super().sources()
        self._revisit: Callable[[], Callable[[Tensor, bool], Any] | None] = lambda: None

    def sources(self) -> list[Tensor]:
        return self._sources

    def revisited_by(self, revisit: Callable[[], Callable[[Tensor, bool], Any] | None]) -> None:
        """Forget the graph: from now on ``revisit()`` computes the loss anew, while it is there.

        What that returns takes a point and whether `in_theta` is wanted there.
        """
        self._revisit, self.parameters = revisit, ()
        del self.loss, self._inputs, self._stand_ins

    def moved(self, point: Tensor) -> AutogradLinearization:
        """The same objective linearized at another ``point``, without products."""
        return self._at(point, False)

    def gradients(self, point: Tensor) -> tuple[Tensor, Products]:
        r"""At a ``point``: :math:`\nabla_\phi g`, shape ``[1, n]``, and `in_theta`."""
        try:
            there = self._at(point, True)
        except ValueError as error:
            if isinstance(error, checks.NotFinite):
                raise
            raise RuntimeError(_ANOTHER) from error
        if there.operations != self.operations or len(there.sources()) != len(self._sources):
            raise RuntimeError(_ANOTHER)
        if torch.equal(point, self.point):
            # Of the loss's own: at a minimum the whole gradient is next to none.
            size = torch.maximum(self.loss_gradient.norm(), there.loss_gradient.norm())
            tol = torch.finfo(point.dtype).eps ** 0.5 * size
            if not bool((there.gradient - self.gradient).norm() <= tol):
                raise RuntimeError(_ANOTHER)
        return there.gradient, there.in_theta()

    def _at(self, point: Tensor, in_theta: bool) -> Any:
        revisit = self._revisit()
        if revisit is None:
            raise RuntimeError(
                "backward: expected the learner whose closure linear=Perturbed() is to call again, "
                "got one that is gone; compute the loss by learner(...), or keep the learner"
            )
        return revisit(point, in_theta)


_ANOTHER = (
    "backward: expected adapt()'s closure to compute the inner loss that it computed then, got "
    "another one: a variable that it uses stands for something else by now (call backward() before "
    "the loop goes on), data or weights were changed, or each call draws anew; bind the variables "
    "(lambda x=x, y=y: ...), and change data after backward()"
)


def inner_gradient(
    loss: Tensor, parameters: Sequence[Tensor], unused: bool, **graph: bool
) -> tuple[Tensor | None, ...]:
    """The loss's gradients in ``parameters``; None for an unused one, where that is allowed."""
    gradients = gradients_of(loss, parameters, allow_unused=True, **graph)
    checks.used(gradients, unused)
    checks.dense(gradients)
    return gradients


def pulled_back(
    ends: Sequence[Tensor | None], inputs: Sequence[Any], weights: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The derivatives in ``inputs`` of ``ends``, each along its weight; None stands for zero."""
    pairs = zip(ends, weights, strict=True) if inputs else ()
    kept = [(z, w) for z, w in pairs if z is not None and w is not None and z.requires_grad]
    if not kept:
        return [None] * len(inputs)
    ends, weights = zip(*kept, strict=True)
    return gradients_of(ends, inputs, weights, retain_graph=True, allow_unused=True)


def gradients_of(*arguments: Any, **options: Any) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad``, whose refusals say what to do."""
    try:
        return grad(*arguments, **options)
    except RuntimeError as error:
        raise RuntimeError(refusals.of_gradients(error)) from error


def flat(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """Gradients as one vector ``[1, n]``, with zeros where there was none."""
    pairs = zip(gradients, like, strict=True)
    return flatten(torch.zeros_like(t) if g is None else g for g, t in pairs).unsqueeze(0)
