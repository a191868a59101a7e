"""The inner loop of a closure: the objective as a function of phi, and the steps on it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from l2l_implicit.linearization import Linearization

Closure = Callable[[], Tensor]
Put = Callable[[Tensor, list[Tensor]], list[Tensor]]
Step = Callable[[Linearization], Tensor]
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

    def linearize(self, vector: Tensor, differentiable: bool) -> Linearization:
        """The linearization at ``vector``, shape ``[n]``; without products unless wanted."""
        self.phi = self._put(vector, self.phi)
        return self._linearize(self._closure(), self.phi, differentiable)

    def evaluate(self, vector: Tensor) -> tuple[float, Tensor]:
        """The objective and its gradient at ``vector``, shapes ``[n]``."""
        at = self.linearize(vector, False)
        return at.objective, at.gradient


def descend(
    objective: ClosureObjective, step: Step, vector: Tensor, *, steps: int, hvp: bool, keep: bool
) -> tuple[Tensor, Linearization | None]:
    """Phi after ``steps`` inner steps from ``vector``, and the linearization there.

    Args:
        objective: is linearized at each point in turn; one linearization is alive at a time.
        step: the inner solver; it says by ``at.point`` itself that further steps would stay there.
        vector: shape ``[n]``.
        steps: the most steps.
        hvp: whether ``step`` needs products.
        keep: whether the last linearization is wanted, with products.
    """
    at: Linearization | None = objective.linearize(vector, hvp)
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
    return vector, at
