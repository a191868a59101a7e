"""What an inner solver is, when it stops, and the loop of a closure around it."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from l2l_implicit.inner_problem.linearization import Evaluate, Linearization


class InnerStep(Protocol):
    """The state of one task's adaptation: maps a linearization to the next phi, ``[T, n]``.

    One that returns ``at.point`` itself says that there is nothing left to do. One that has an
    attribute ``needs_hvp`` equal to False is given linearizations without products in the middle of
    a closure's steps.

    Example:
        >>> from l2l_implicit import InnerStep, Linearization
        >>> def damped(at: Linearization) -> torch.Tensor:
        ...     return at.point - 0.1 * at.gradient
        >>> step: InnerStep = damped
    """

    def __call__(self, at: Linearization) -> Tensor: ...


class InnerSolver(Protocol):
    """Settings of a method that finds the inner minimum; the hypergradient does not care which.

    It may assume that ``begin`` is called once for each task's adaptation, and anew for each
    ``adapt(closure)`` of a linear head; that the step then sees one linearization after the other,
    T = 1, each at the point that it returned last unless the user has set other weights; that
    gradient and objective there are finite; and that ``at.evaluate`` works with a closure, or a
    linear head's cross-entropy or squared error, and raises otherwise.

    It must return points of the given shape, dtype and device, without a graph, and leave ``at``
    unchanged. Whether it has solved the problem is judged from the gradient where it ends.

    A solver that knows linear heads in closed form may have a method
    ``solve_heads(at, steps, lr) -> LinearHeads | None``: at most ``steps`` steps for all T tasks of
    ``at``, or None for a problem that it leaves to its steps. With an attribute ``at_once`` equal
    to True it solves the problem whatever ``steps`` says, at the first ``adapt(loss)`` too.

    Example:
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitCGHead, InnerStep, Linearization
        >>> class HeavyBall:
        ...     def begin(self, lr: float) -> InnerStep:
        ...         velocity = torch.zeros(())
        ...         def step(at: Linearization) -> torch.Tensor:
        ...             nonlocal velocity
        ...             velocity = 0.9 * velocity - lr * at.gradient
        ...             return at.point + velocity
        ...         return step
        >>> learner = ImplicitCGHead(nn.Linear(10, 5), lr=0.1, inner=HeavyBall()).clone()
        >>> x, y, loss = torch.randn(25, 10), torch.arange(25) % 5, nn.CrossEntropyLoss()
        >>> learner.adapt(lambda: loss(learner(x), y), steps=100)
    """

    def begin(self, lr: float) -> InnerStep:
        """The state of a new task; ``lr`` is the learner's inner step size."""
        ...


class Stop:
    """Says when the inner gradient is small enough: at a norm of ``tol`` relative to its scale.

    That is the largest gradient so far, or the regulariser's own where that is larger: at a minimum
    it equals the loss's, wherever the solver started.
    """

    def __init__(self, tol: float) -> None:
        self._tol, self._largest = tol, 0.0

    def __call__(self, at: Linearization) -> bool:
        norm = float(at.gradient_norm)
        self._largest = max(self._largest, norm)
        return norm <= self.floor(at) * max(self._largest, float(at.regularizer_norm()))

    def floor(self, at: Linearization) -> float:
        """The tolerance, no smaller than what the dtype can show; only that with an accuracy."""
        tol = self._tol if at.accuracy is None else 0.0
        return max(tol, 10 * torch.finfo(at.point.dtype).eps)

    def progress(self, at: Linearization) -> float:
        """The gradient's norm relative to its largest; 0 for a start without a gradient."""
        return float(at.gradient_norm) / self._largest if self._largest > 0.0 else 0.0


def descend(
    linearize: Callable[[Tensor, bool], Linearization], evaluate: Evaluate,
    step: Callable[[Linearization], Tensor], start: Callable[[], Tensor],
    *, steps: int, hvp: bool, keep: bool,
) -> Linearization:  # fmt: skip
    """The linearization where at most ``steps`` inner steps have ended.

    One linearization is alive at a time, so that memory is the same whatever the number of steps.

    Args:
        linearize, evaluate: the objective at a point ``[1, n]``, with products or without; its
            value and gradient alone.
        step: the inner solver; it says by ``at.point`` itself that further steps would stay there.
        start: gives the first point, shape ``[1, n]``, which nobody else is to hold.
        hvp: whether ``step`` needs products.
        keep: whether the last linearization is to have products.
    """
    at = linearize(start(), hvp)
    for left in reversed(range(steps)):
        at.elsewhere = evaluate
        point = step(at)
        at.elsewhere = None  # it would hold the learner
        solved = point is at.point
        if solved and (at.differentiable or not keep):
            break
        last = solved or not left
        del at  # freed before there are two
        at = linearize(point, keep if last else hvp)
        if last:
            break
    return at
