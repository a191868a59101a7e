"""What a learner says of its last task, and how often a hypergradient was not to be trusted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from l2l_implicit.inner_problem.linearization import Sizes
from l2l_implicit.linear_solvers.solution import INEXACT, REMEDIES


class UnsolvedWarning(UserWarning):
    """The hypergradient's error may be above ``max_error``: the inner problem or the linear system
    was not solved well enough.

    Given once by each learner: by ``backward()``; at test time, where there is none, by ``adapt``
    under ``torch.no_grad()``, else when the next task begins. `Diagnostics` counts every case.

    Example:
        >>> import warnings
        >>> import torch
        >>> from l2l_implicit import GradientDescent, ImplicitCGHead, UnsolvedWarning
        >>> x, head = torch.randn(9, 4), torch.nn.Linear(4, 2)
        >>> learner = ImplicitCGHead(head, lr=0.01, inner=GradientDescent()).clone()
        >>> learner.adapt(lambda: learner(x).square().mean(), steps=1)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("error", UnsolvedWarning)  # stop there instead
        ...     try:
        ...         learner(x).sum().backward()
        ...     except UnsolvedWarning as warning:
        ...         print(str(warning)[:31])
        the inner problem is not solved
    """


class Settings(NamedTuple):
    """What a warning names besides the numbers: ``max_error``, the solvers, and whether a factor
    of the inner solve is at hand."""

    limit: float
    inner: object
    linear: object
    solved: bool


@dataclass
class Diagnostics:
    """The last task's diagnostics; on a parent, those of its last clone to be used.

    ``adapt`` fills in the first two and ``unsolved_inner``, also under ``torch.no_grad()``. The
    rest is ``backward()``'s: nan, ``""`` or 0 until then.

    Attributes:
        inner_steps: inner steps before the linearization.
        inner_gradient_norm: norm of the inner objective's gradient at the linearization point:
            where a closure's steps ended; with loss tensors, where the last loss was computed.
        cg_steps: Hessian-vector products of the last linear solve, gradients with `Perturbed`; 0
            for a factor.
        cg_residual: relative residual of the linear system.
        cg_reason: why the linear solver stopped.
        hypergradient_error: how wrong the hypergradient may be, relative to its size: from the
            inner gradient's norm, the linear residual and l2, with what rounding costs. A bound for
            a linear head with l2 > 0, an estimate for any other module; the derivation is in
            docs/mathematics.md.
        is_bound: which of the two it is.
        hypergradients: how many were computed.
        unsolved: how many of them had an error above ``max_error``.
        unsolved_inner: how many inner problems make one by themselves, with a hypergradient or (at
            test time) without.
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
    # An unsolved inner problem of which no hypergradient has spoken yet: its error, and settings.
    _open: tuple[float, Settings] | None = field(default=None, repr=False, compare=False)
    _waiting: Diagnostics | None = field(default=None, repr=False, compare=False)

    def _line(self) -> Iterator[Diagnostics]:
        """This one, its parent, and so on to the learner's own."""
        one: Diagnostics | None = self
        while one is not None:
            yield one
            one = one.parent

    def adapted(self, steps: int, norm: float, error: float, settings: Settings) -> None:
        """Take note of an inner problem as ``adapt`` left it, here and on every parent.

        Args:
            steps, norm: inner steps taken; norm of the inner gradient.
            error: of a hypergradient, as far as the inner problem makes it.
            settings: what a warning names.
        """
        bad, before = not error <= settings.limit, self._open is not None
        self._open = (error, settings) if bad else None
        for one in self._line():
            one.inner_steps, one.inner_gradient_norm = steps, norm
            one.cg_steps, one.cg_residual, one.cg_reason = 0, math.nan, ""
            one.hypergradient_error, one.is_bound = math.nan, False
            one.unsolved_inner += bad - before  # a further step of the same task may have solved it
        one._waiting = self if bad and not one._said else one._waiting

    def say(self) -> None:
        """Warn of an unsolved inner problem to which no hypergradient has come."""
        *_, root = self._line()
        waiting, root._waiting = root._waiting, None
        if waiting is not None and waiting._open is not None and not root._said:
            root._said, (error, settings) = True, waiting._open
            text = waiting._why((error, 0.0, 0.0), settings)
            warnings.warn(text, UnsolvedWarning, stacklevel=3)

    def record(
        self, steps: int, products: int, reason: str, sizes: Sizes,
        errors: tuple[float, float, float], is_bound: bool, settings: Settings,
    ) -> None:  # fmt: skip
        """Take note of one hypergradient, here and on every parent; warn of the first bad one.

        Args:
            steps, products, reason: inner steps taken; of the linear solve.
            sizes: norms at the linearization.
            errors, is_bound: its error's parts (inner problem, linear system, rounding), and
                whether their sum is a bound.
            settings: what a warning names.
        """
        bad, inner, linear = (
            not error <= settings.limit for error in (sum(errors), *errors[:2])
        )  # fmt: skip
        before, self._open = self._open is not None, None
        for one in self._line():
            one.inner_steps, one.inner_gradient_norm = steps, sizes.gradient
            one.cg_steps, one.cg_residual, one.cg_reason = products, sizes.residual, reason
            one.hypergradient_error, one.is_bound = sum(errors), is_bound
            one.hypergradients += 1
            one.unsolved += bad
            one.unsolved_inner += inner - before  # counted by adapt() already
            one.unsolved_linear += linear
        if bad and not one._said:
            one._said = True
            warnings.warn(self._why(errors, settings), UnsolvedWarning, stacklevel=2)

    def unreached(self) -> None:
        """Warn, once, that a hypergradient reached nothing that could be meta-learned."""
        *_, root = self._line()
        if not root._said_unreached:
            root._said_unreached = True
            warnings.warn(
                "backward: expected an inner loss that depends on something to be meta-learned, "
                "got one whose gradient depends on nothing besides the adapted parameters: their "
                "implicit gradient is zero everywhere; pass features with their graph (not "
                "detached), or, for a whole network, use ImplicitMAML, or anchor=\"init\" (said "
                "once)",
                stacklevel=2,
            )

    def _why(self, errors: tuple[float, float, float], settings: Settings) -> str:
        """What is wrong, by the largest part of the error, and what to do."""
        limit, inner, linear, solved = settings
        parts = [math.inf if math.isnan(error) else error for error in errors]
        if parts[0] == max(parts):
            what = (
                f"the inner problem is not solved: an inner gradient of norm "
                f"{self.inner_gradient_norm:.2g} after {self.inner_steps} steps of {inner}"
            )
            remedy = "use inner=Newton()"
            if solved:
                remedy = "scale the features down, or raise l2"
            elif getattr(inner, "at_once", False):
                remedy = "take more steps, or raise l2"
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
            remedy = "use float64, scale the features down, or raise l2"
        got = f"{'at most' if self.is_bound else 'about'} {sum(parts):.2g}"
        got = got if sum(parts) < 100.0 else "one that is not known"
        return (
            f"{what}; expected a relative error of the hypergradient of at most {limit:g}, got "
            f"{got}: {remedy} (said once; .diagnostics counts the rest)"
        )
