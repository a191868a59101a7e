"""L-BFGS with a line search: torch's own, an iteration at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_solvers.protocol import Stop

_PATIENCE = 15
_MOST_TRIALS = 26  # of a line search; unless told, torch of late allows one, that is, no search


@dataclass(frozen=True)
class LBFGS:
    """``torch.optim.LBFGS`` with the strong Wolfe line search; a step is one iteration.

    The line search evaluates the objective at other points than the present one: a linear head's
    cross-entropy or squared error can, and so can a closure. Any other loss tensor is refused.

    Args:
        history: pairs of differences that it keeps.
        tol: the gradient's norm, relative to its largest, at which phi is left where it is.

    References:
        Nocedal, Wright (2006), Algorithms 3.5 and 7.5.

    Example:
        >>> from l2l_implicit import LBFGS
        >>> LBFGS(history=10)
        LBFGS(history=10, tol=1e-05)
    """

    history: int = 20
    tol: float = 1e-5

    def __post_init__(self) -> None:
        checks.count("LBFGS: history", self.history)
        checks.positive("LBFGS: tol", self.tol)

    def begin(self, lr: float) -> LBFGSStep:
        """The state of a new task."""
        return LBFGSStep(self.tol, self.history)


class LBFGSStep:
    """The state of `LBFGS` for one task, T = 1."""

    needs_hvp = False

    def __init__(self, tol: float, history: int) -> None:
        self._stop, self._history = Stop(tol), history
        self._phi: Tensor | None = None
        self._objective = math.inf
        self._best: tuple[Tensor, float] | None = None  # in whole steps: a point, its gradient norm
        self._worse = 0  # whole steps since then

    def __call__(self, at: Linearization) -> Tensor:
        norm = float(at.gradient_norm)
        if self._stop(at):
            return at.point
        if self._best is not None and norm > 2.0 * self._best[1]:
            if torch.equal(at.point, self._best[0]):  # another gradient there: the data changed
                self._best, self._phi, self._objective = None, None, math.inf
        if self._best is not None:
            return self._whole_step(at, norm, *self._best)
        objective = float(at.objective)
        rounding = 10 * torch.finfo(at.point.dtype).eps * abs(objective)
        flat, self._objective = self._objective - objective <= rounding, objective
        if not flat:
            moved = self._iterate(at, "strong_wolfe")
            assert self._phi is not None
            # Where nothing is known of the curvature, a whole step could be any size.
            if not torch.equal(moved, at.point) or not self._optimizer.state[self._phi]["old_dirs"]:
                return moved
        return self._whole_step(at, norm, at.point, math.inf)

    def _whole_step(self, at: Linearization, now: float, best: Tensor, norm: float) -> Tensor:
        """Where the objective is flat to its last digits: no line search, the gradient judges."""
        if now < norm:
            self._best, self._worse = (at.point, now), 0
        else:
            self._worse += 1
        if self._worse <= _PATIENCE and now < 1e3 * norm:
            return self._iterate(at, None)
        self._worse = _PATIENCE
        return at.point if torch.equal(at.point, best) else best

    def _iterate(self, at: Linearization, line_search: str | None) -> Tensor:
        """One iteration of torch's, from the present point."""
        if self._phi is None:
            norm, strength = float(at.gradient_norm), at.quadratic.strength
            # Torch drops pairs of differences whose product is below 1e-10, whatever the units:
            # in these, the product begins at about 1e6.
            self._unit = 1e6 / max(norm**2, 1e-20)
            # No longer at first than the most that a convex problem's minimum is away: next to it,
            # as after a warm start, a line search from 1 sees only rounding.
            reach = min(1.0, norm / strength) if strength > 0.0 else 1.0
            self._phi = at.point.clone().requires_grad_()
            self._optimizer = torch.optim.LBFGS(
                [self._phi], max_iter=1, max_eval=_MOST_TRIALS, tolerance_grad=0.0,
                tolerance_change=0.0, history_size=self._history, lr=reach,
            )  # fmt: skip
        phi, before, settings = self._phi, at.point, self._optimizer.param_groups[0]
        phi.data.copy_(before)

        def objective() -> float:
            here = torch.equal(phi, before)
            value, gradient = (
                (at.objective, at.gradient) if here else at.evaluate(phi.detach().clone())
            )
            phi.grad = gradient * self._unit
            return float(value) * self._unit

        settings["line_search_fn"] = line_search
        self._optimizer.step(objective)  # type: ignore[arg-type]
        phi.grad, settings["lr"] = None, 1.0
        return phi.detach().clone()
