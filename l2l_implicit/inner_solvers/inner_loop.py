"""The inner loop of a closure: the objective as a function of phi, and the steps on it.

A loss that has a closed form is known everywhere once it is known at one point: its steps need no
closure. That it was the same loss all along is seen at the end, where the closure is called again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from l2l_implicit.inner_problem.boundary import end_of_gradients
from l2l_implicit.inner_problem.linear_head import LinearHeadLinearization
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_problem.span import HeadInSpan, SpanLinearization

Closure = Callable[[], Tensor]
Put = Callable[[Tensor, list[Tensor]], list[Tensor]]
Step = Callable[[Linearization], Tensor]
Back = Callable[[], None]
Linearize = Callable[[Tensor, list[Tensor], bool], Linearization]


class ClosureObjective:
    """Puts phi into the module, calls the closure, linearizes its loss.

    Args:
        closure: returns the loss of the learner as it then is.
        phi: the module's parameters at present.
        put: makes a vector ``[n]`` the module's parameters in place of those given, as leaves.
        linearize: of a loss, the parameters it was computed from, and whether with products.

    Attributes:
        phi: the tensors that the module holds now.
    """

    def __init__(
        self, closure: Closure, phi: list[Tensor], put: Put, linearize: Linearize
    ) -> None:
        self.phi = phi
        self._closure, self._put, self._linearize = closure, put, linearize
        self._leaves: list[Tensor] = []

    def linearize(self, vector: Tensor, differentiable: bool) -> Linearization:
        """The linearization at ``vector``, shape ``[n]``; without products unless wanted."""
        self.leave()
        self.phi = self._leaves = self._put(vector, self.phi)
        return self._linearize(self._closure(), self.phi, differentiable)

    def leave(self) -> None:
        """The present phi is about to be replaced: no gradient is to end in it from now on."""
        end_of_gradients(self._leaves)

    def evaluate(self, vector: Tensor) -> tuple[float, Tensor]:
        """The objective and its gradient at ``vector``, shapes ``[n]``."""
        at = self.linearize(vector, False)
        return at.objective, at.gradient


def descend(
    objective: ClosureObjective,
    step: Step,
    vector: Tensor,
    *,
    steps: int,
    hvp: bool,
    keep: bool,
    restart: Callable[[], tuple[Back, Back]] | None,
) -> tuple[Tensor, Linearization | None]:
    """Phi after ``steps`` inner steps from ``vector``, and the linearization there.

    Args:
        objective: is linearized at each point in turn; one linearization is alive at a time.
        step: the inner solver; it says by ``at.point`` itself that further steps would stay there.
        vector: shape ``[n]``.
        steps: the most steps.
        hvp: whether ``step`` needs products.
        keep: whether the last linearization is wanted, with products.
        restart: gives ``step`` a fresh state, and returns what brings the old one back and what
            ends the new one; None if nothing does.
    """
    at: Linearization | None = objective.linearize(vector, hvp)
    if isinstance(at, LinearHeadLinearization) and restart is not None:
        back, forget = restart()
        try:
            point = _closed_form_steps(at, step, steps)
            end = _same_objective(objective.linearize(point, True), at)
        except BaseException:
            back()
            raise
        if end is not None:
            forget()
            objective.leave()
            return point, end
        back()  # the closure draws anew each time: it has to be asked at each step
    for k in range(1, steps + 1):
        assert at is not None
        at.elsewhere = objective.evaluate
        vector = step(at)
        at.elsewhere = None  # it would hold the learner
        solved = vector is at.point
        if solved and (at.differentiable or not keep):
            break
        at = None  # before there are two
        last = solved or k == steps
        if keep or not last:
            at = objective.linearize(vector, hvp or last)
        if last:
            break
    if keep:
        objective.leave()
    return vector, at


def _same_objective(
    end: Linearization, start: LinearHeadLinearization
) -> LinearHeadLinearization | None:
    """``end``, if the closure has returned the same loss as at the start."""
    if isinstance(end, LinearHeadLinearization) and end.same_objective(start):
        return end
    return None


def _closed_form_steps(start: LinearHeadLinearization, step: Step, steps: int) -> Tensor:
    """Phi after the steps, if the closure returns the same loss all along."""
    if not start.reducible():
        return _walk(start, step, steps)
    head = HeadInSpan(start)
    u = _walk(SpanLinearization(head, start.output_loss, head.start), step, steps)
    return head.phi(u)


def _walk(at: LinearHeadLinearization | SpanLinearization, step: Step, steps: int) -> Tensor:
    for _ in range(steps):
        vector = step(at)
        if vector is at.point:
            break
        at = at.moved(vector)
    return at.point
