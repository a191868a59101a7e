"""The methods that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.hypergradient.problems import Problem
from l2l_implicit import LinearSolution
from l2l_implicit.learner import ImplicitCGHead
from l2l_implicit.linear_solve import CONVERGED, MAX_STEPS


class Method(NamedTuple):
    """How a problem's learner is made, and whether its loss carries the regulariser."""

    make: Callable[[Problem], Any]
    penalty: bool


def methods(names: tuple[str, str], cg_steps: Sequence[int]) -> dict[str, Method]:
    """Every method by the name under which it is recorded.

    Args:
        names: of the implicit and of the unrolled algorithm.
        cg_steps: the numbers N of conjugate gradient steps.
    """
    implicit, unrolled = names
    found = {f"{implicit}_cg{n}": Method(_with(n, False), False) for n in cg_steps}
    found |= {f"{implicit}_cg{n}_last_iterate": Method(_with(n, True), False) for n in cg_steps}
    found[unrolled] = Method(lambda problem: problem.unrolled(), True)
    found[f"{unrolled}_unregularised"] = Method(lambda problem: problem.unrolled(), False)
    return found


def _with(steps: int, last: bool) -> Callable[[Problem], Any]:
    def make(problem: Problem) -> Any:
        learner = problem.implicit(steps)
        if last:
            learner.__class__ = _last_iterate(type(learner))
        return learner

    return make


def _last_iterate(cls: type[ImplicitCGHead]) -> type[ImplicitCGHead]:
    """The same learner with Subroutine 1 as printed, which returns its last iterate.

    The package returns the iterate of the smallest residual. The error falls at every step, the
    residual need not: on an ill-conditioned system it first rises above that of zero.
    """

    class LastIterate(cls):  # type: ignore[valid-type, misc]
        def linear_solve(
            self, hvp: Callable[[Tensor], Tensor], b: Tensor, start: Tensor | None
        ) -> LinearSolution:
            return subroutine_1(hvp, b, self.cg_steps, self.cg_tol)

    return LastIterate


def subroutine_1(
    matvec: Callable[[Tensor], Tensor], b: Tensor, steps: int, tol: float
) -> LinearSolution:
    """Conjugate gradient from zero: its last iterate, or the first of a residual below ``tol``.

    References:
        Yang et al. (2025), Subroutine 1, in its names.
    """
    v, r, p, rr = torch.zeros_like(b), b, b, b.dot(b)
    taken, limit = 0, tol**2 * rr
    while taken < steps and rr > limit:
        h = matvec(p)
        eta = rr / p.dot(h)
        v, r = v + eta * p, r - eta * h
        rr, before = r.dot(r), rr
        p, taken = r + rr / before * p, taken + 1
    reason = CONVERGED if rr <= limit else MAX_STEPS
    norm = float(rr.sqrt())
    return LinearSolution(v, taken, norm, norm / float(b.norm()), reason)
