"""The methods that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from experiments.papers.hypergradient.problems import Problem


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
    found = {f"{implicit}_cg{n}": Method(_with(n), False) for n in cg_steps}
    found[unrolled] = Method(lambda problem: problem.unrolled(), True)
    found[f"{unrolled}_unregularised"] = Method(lambda problem: problem.unrolled(), False)
    return found


def _with(steps: int) -> Callable[[Problem], Any]:
    return lambda problem: problem.implicit(steps)
