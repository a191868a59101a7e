"""What a learner knows of the one task it adapts to, and what it remembers of tasks before."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

from l2l_implicit.implicit_diff import Cell
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_problem.regularizer import SquaredDistance
from l2l_implicit.inner_solvers.gradient_descent import InnerStep


class Remembered(NamedTuple):
    """A task's phi and v, shape ``[n]`` each, at the end of its last visit."""

    phi: Tensor
    v: Tensor


Memory = dict[Hashable, Remembered]


class Task:
    """The state of one adaptation.

    Args:
        key: the task's identity, or None.
        initial: the module's parameters before the first step, with their history.

    Attributes:
        quadratic: the regulariser in closed form, once there is one.
        stepper: the inner solver with its state, once there is one.
        first_norm: norm of the first inner gradient.
        steps: inner steps taken.
        vector: the current parameters as one vector, while ``first`` is the first of them.
        first: see ``vector``.
        solved: whether the inner solver has said that there is nothing left to do.
        independent: features that are known not to depend on phi.
        cell: the linearization that the current parameters depend on, if one is alive.
    """

    __slots__ = (
        "cell", "first", "first_norm", "independent", "initial", "key", "quadratic", "solved",
        "stepper", "steps", "vector",
    )  # fmt: skip

    def __init__(self, key: Hashable | None, initial: list[Tensor]) -> None:
        self.key, self.initial = key, initial
        self.quadratic: SquaredDistance | None = None
        self.stepper: InnerStep | None = None
        self.first_norm, self.steps, self.solved = 0.0, 0, False
        self.cell: weakref.ref[Cell] | None = None
        self.vector: Tensor | None = None
        self.first: Tensor | None = None
        self.independent: set[weakref.ref[Tensor]] = set()

    def vector_of(self, phi: Sequence[Tensor]) -> Tensor | None:
        """``phi`` as one vector, if it is what was last installed."""
        if self.vector is None or phi[0] is not self.first:
            return None
        return self.vector if sum(p.numel() for p in phi) == self.vector.numel() else None

    def linearization(self) -> Linearization | None:
        """The one that the current parameters depend on, if it is alive."""
        cell = None if self.cell is None else self.cell()
        return None if cell is None else cell.linearization

    def restart(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Begin with a fresh inner solver; returns how to undo that, and how to be done with it."""
        before = self.stepper, self.steps, self.first_norm, self.solved
        self.stepper = None

        def undo() -> None:
            self.stepper, self.steps, self.first_norm, self.solved = before

        def done() -> None:
            self.stepper = None  # its state was in other coordinates

        return undo, done

    def release(self) -> None:
        """Drop the linearization that the next one replaces."""
        cell = None if self.cell is None else self.cell()
        if cell is not None:
            cell.linearization = None

    def summary(self) -> Task:
        """What the backward pass needs: no tensors."""
        short = Task(self.key, [])
        short.first_norm, short.steps = self.first_norm, self.steps
        return short
