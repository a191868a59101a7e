"""The inner loop of a closure: the objective as a function of phi, and the steps on it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from l2l_implicit.inner_problem.linearization import Evaluate, Linearization


def descend(
    linearize: Callable[[Tensor, bool], Linearization], evaluate: Evaluate,
    step: Callable[[Linearization], Tensor], start: Callable[[], Tensor],
    *, steps: int, hvp: bool, keep: bool,
) -> tuple[Tensor, Linearization | None]:  # fmt: skip
    """Phi after at most ``steps`` inner steps, and the linearization there.

    One linearization is alive at a time, so that memory is the same whatever the number of steps.

    Args:
        linearize, evaluate: the objective at a point ``[1, n]``, with products or without; its
            value and gradient alone.
        step: the inner solver; it says by ``at.point`` itself that further steps would stay there.
        start: gives the first point, shape ``[1, n]``, which nobody else is to hold.
        steps: the most steps.
        hvp: whether ``step`` needs products.
        keep: whether the last linearization is wanted, with products.
    """
    point = start()
    at: Linearization | None = linearize(point, hvp)
    for left in reversed(range(steps)):
        assert at is not None
        at.elsewhere = evaluate
        point = step(at)
        at.elsewhere = None  # it would hold the learner
        solved = point is at.point
        if solved and (at.differentiable or not keep):
            break
        at, last = None, solved or not left  # freed before there are two
        if keep or not last:
            at = linearize(point, hvp or last)
        if last:
            break
    return point, at
