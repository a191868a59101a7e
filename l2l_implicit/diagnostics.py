"""What a learner says of its last task, and how often a hypergradient was not to be trusted."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from l2l_implicit.inner_problem.linearization import Sizes
from l2l_implicit.linear_solvers.solution import INEXACT, REMEDIES

_UNREACHED = (
    "backward: expected an inner loss that depends on something to be meta-learned, got one whose "
    "gradient depends on nothing besides the adapted parameters: their implicit gradient is zero "
    "everywhere; pass features with their graph (not detached), or, for a whole network, use "
    'ImplicitMAML, or anchor="init" (said once)'
)
_NOT_CARRIED = (
    "backward: expected parameters that adapt() left with gradients enabled, got those of an "
    "adapt() under torch.no_grad(), or of a file or a deep copy: no implicit gradient; call "
    "adapt() outside it, or again (said once)"
)


class UnsolvedWarning(UserWarning):
    """The hypergradient's error may be above ``max_error``: the inner problem or the linear system
    was not solved well enough.

    Given once by each learner: by ``backward()``; at test time, where there is none, by ``adapt``
    under ``torch.no_grad()``, else when the next task begins. `Diagnostics` counts every case.

    Example:
        >>> import warnings
        >>> from l2l_implicit import UnsolvedWarning
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", UnsolvedWarning)  # within, stop at the first one
    """


@dataclass
class Diagnostics:
    """The last task's diagnostics; on a parent, those of its last clone to be used.

    ``adapt`` fills in the first two and ``unsolved_inner``, also under ``torch.no_grad()``. The
    rest is ``backward()``'s: nan, ``""`` or 0 until then; a parent keeps its last hypergradient's.

    Attributes:
        inner_steps: inner steps before the linearization.
        inner_gradient_norm: norm of the inner objective's gradient at the linearization point:
            where a closure's steps ended; with loss tensors, where the last loss was computed.
        cg_steps: Hessian-vector products of the last linear solve (`Perturbed`: gradients); or 0.
        cg_residual: relative residual of the linear system.
        cg_reason: why the linear solver stopped.
        hypergradient_error: how wrong the hypergradient may be, relative to its size: from the
            inner gradient's norm, the linear residual and l2, with what rounding costs. A bound for
            a linear head with l2 > 0, else an estimate, derived in docs/mathematics.md.
        is_bound: which of the two it is.
        hypergradients: how many were computed.
        unsolved: how many of them had an error above ``max_error``.
        unsolved_inner: how many inner problems make one by themselves, also at test time.
        unsolved_linear: how many linear systems do.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitCGHead
        >>> head, loss = ImplicitCGHead(nn.Linear(10, 5), lr=0.1), nn.CrossEntropyLoss()
        >>> h, y = torch.randn(25, 10, requires_grad=True), torch.arange(25) % 5
        >>> learner = head.clone()
        >>> learner.adapt(loss(learner(h), y))
        >>> loss(learner(h), y).backward()
        >>> head.diagnostics.hypergradients, head.diagnostics.hypergradient_error < 1e-3
        (1, True)
    """

    inner_steps: int = 0
    inner_gradient_norm: float = math.nan
    cg_steps: int = 0
    cg_residual: float = math.nan
    cg_reason: str = ""
    hypergradient_error: float = math.nan
    is_bound: bool = False
    hypergradients: int = 0
    unsolved: int = 0
    unsolved_inner: int = 0
    unsolved_linear: int = 0
    parent: Diagnostics | None = field(default=None, repr=False, compare=False)
    _said: bool = field(default=False, repr=False, compare=False)
    _said_unreached: bool = field(default=False, repr=False, compare=False)
    # Of an unsolved inner problem to which no hypergradient has come; a parent's last of those.
    _open: tuple[Any, ...] | None = field(default=None, repr=False, compare=False)
    waiting: Diagnostics | None = field(default=None, repr=False, compare=False)

    def record(
        self, steps: int, products: int, reason: str | None, sizes: Sizes,
        errors: tuple[float, float, float], is_bound: bool, settings: tuple[float, object, object],
    ) -> None:  # fmt: skip
        """Take note of one hypergradient, here and on every parent; warn of the first bad one.

        Args:
            steps, products, reason: inner steps taken; of the linear solve. None: of an inner
                problem as ``adapt`` has left it, without a hypergradient.
            errors, is_bound: its error's parts (inner problem, linear system, rounding), and
                whether their sum is a bound.
            settings: ``max_error``, and the two solvers, which a warning names.
        """
        error, limit = sum(errors), settings[0]
        bad, inner, linear = not error <= limit, not errors[0] <= limit, not errors[1] <= limit
        done, before = reason is not None, self._open is not None
        waits = inner and not done
        self._open = (errors[0], is_bound, settings) if waits else None
        lineage = self._lineage()
        for one in lineage:
            one.inner_steps, one.inner_gradient_norm = steps, sizes.gradient
            if done or one is self:  # a parent keeps what its last hypergradient said
                one.cg_steps, one.cg_residual = products, sizes.residual
                one.cg_reason, one.hypergradient_error = reason or "", error
                one.is_bound = is_bound and done
            one.unsolved_inner += inner - before  # by a step or a hypergradient of the same task
            if done:
                one.hypergradients += 1
                one.unsolved += bad
                one.unsolved_linear += linear
            one.waiting = self if waits else one.waiting
        if bad and done and not lineage[-1]._said:
            lineage[-1]._said = True
            warnings.warn(self._why(errors, is_bound, *settings), UnsolvedWarning, stacklevel=2)

    def say(self) -> None:
        """Warn of an unsolved inner problem to which no hypergradient has come."""
        last, self.waiting, root = self.waiting, None, self._lineage()[-1]
        if last is not None and last._open is not None and not root._said:
            root._said, (error, is_bound, settings) = True, last._open
            text = last._why((error, 0.0, 0.0), is_bound, *settings)
            warnings.warn(text, UnsolvedWarning, stacklevel=3)

    def unreached(self, leaf: Tensor | None = None) -> None:
        """Warn, once, that no hypergradient reaches what is meta-learned; or ends in a ``leaf``."""
        root = self._lineage()[-1]
        if not root._said_unreached:
            root._said_unreached = True
            warnings.warn(_UNREACHED if leaf is None else _NOT_CARRIED, stacklevel=2)

    def _lineage(self) -> list[Diagnostics]:
        """These, their parent's, and so on to those of the learner that was made first."""
        return [self, *([] if self.parent is None else self.parent._lineage())]

    def _why(
        self, errors: tuple[float, float, float], is_bound: bool, limit: float, inner: object,
        linear: object,
    ) -> str:  # fmt: skip
        """What is wrong, by the largest part of the error, and what to do."""
        parts = [math.inf if math.isnan(error) else error for error in errors]
        if parts[0] == max(parts):
            what = (
                f"the inner problem is not solved: an inner gradient of norm "
                f"{self.inner_gradient_norm:.2g} after {self.inner_steps} steps of {inner}"
            )
            remedy = "use inner=Newton()"
            if is_bound:
                remedy = "scale the features down, or raise l2"
            elif hasattr(linear, "respond"):  # no second derivatives
                remedy = "use inner=LBFGS() and more steps, or raise l2"
            elif getattr(inner, "at_once", False):
                remedy = "take more steps, give inner= a smaller tol, or raise l2"
        elif parts[1] == max(parts):
            what = (
                f"the linear system is not solved: a relative residual of {self.cg_residual:.2g} "
                f"after {self.cg_steps} steps of {linear} ({self.cg_reason})"
            )
            remedy = REMEDIES.get(self.cg_reason, "raise l2")
        elif self.cg_reason == INEXACT:
            what = f"{linear}: {INEXACT}"
            remedy = REMEDIES[INEXACT]
        else:
            what = "the precision does not suffice for features of this size and this l2"
            remedy = "scale the features down, raise l2, or use float64 where it is not in use"
        got = f"{'at most' if is_bound else 'about'} {sum(parts):.2g}"
        got = got if sum(parts) < 100.0 else "one that is not known"
        return (
            f"{what}; expected a relative error of the hypergradient of at most {limit:g}, got "
            f"{got}: {remedy} (said once; .diagnostics counts the rest)"
        )
