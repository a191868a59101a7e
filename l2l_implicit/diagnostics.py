"""What a learner says of its last task, and how often a hypergradient was not to be trusted."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

from l2l_implicit.linear_solvers.solution import REMEDIES


class UnsolvedWarning(UserWarning):
    """The hypergradient's error may be above ``max_error``: the inner problem or the linear system
    was not solved well enough.

    Given once by each learner; `Diagnostics` counts every case.

    Example:
        >>> import warnings
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import GradientDescent, ImplicitCGHead, UnsolvedWarning
        >>> head = ImplicitCGHead(nn.Linear(10, 5), lr=0.01, inner=GradientDescent())
        >>> h, y = torch.randn(25, 10, requires_grad=True), torch.arange(25) % 5
        >>> learner, loss = head.clone(), nn.CrossEntropyLoss()
        >>> learner.adapt(lambda: loss(learner(h), y), steps=1)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", UnsolvedWarning)  # stop there instead
        ...     try:
        ...         loss(learner(h), y).backward()
        ...     except UnsolvedWarning as warning:
        ...         print(str(warning)[:31])
        the inner problem is not solved
    """


class Report(NamedTuple):
    """One task's hypergradient: see `Diagnostics`; the error falls into its three parts."""

    inner_steps: int
    inner_gradient_norm: float
    cg_steps: int
    cg_residual: float
    cg_reason: str
    inner_error: float
    linear_error: float
    rounding_error: float
    is_bound: bool


class Settings(NamedTuple):
    """What a warning may advise to change."""

    max_error: float
    inner: object
    linear: object
    newton: bool


@dataclass
class Diagnostics:
    """The last hypergradient's diagnostics; on a parent, those of its last clone to be used.

    Attributes:
        inner_steps: inner steps before the linearization.
        inner_gradient_norm: norm of the inner objective's gradient at the linearization point.
        cg_steps: Hessian-vector products of the last linear solve; 0 for a factor.
        cg_residual: relative residual of the linear system.
        cg_reason: why the linear solver stopped.
        hypergradient_error: how wrong the hypergradient may be, relative to its size: from the
            inner gradient's norm, the linear residual and l2, with what rounding costs. A bound for
            a linear head with l2 > 0, an estimate for any other module; the derivation is in
            docs/mathematics.md.
        is_bound: which of the two it is.
        hypergradients: how many were computed.
        unsolved: how many of them had an error above ``max_error``.
        unsolved_inner, unsolved_linear: how many because of the one or the other part alone.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitCGHead
        >>> head, loss = ImplicitCGHead(nn.Linear(10, 5), lr=0.1), nn.CrossEntropyLoss()
        >>> h, y = torch.randn(25, 10, requires_grad=True), torch.arange(25) % 5
        >>> for _ in range(3):
        ...     learner = head.clone()
        ...     learner.adapt(lambda: loss(learner(h), y), steps=20)
        ...     loss(learner(h), y).backward()
        >>> head.diagnostics.hypergradients, head.diagnostics.unsolved
        (3, 0)
        >>> head.diagnostics.hypergradient_error < 1e-3
        True
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

    def record(self, report: Report, settings: Settings) -> None:
        """Take note of one hypergradient, here and on every parent; warn of the first bad one."""
        self.inner_steps, self.inner_gradient_norm = report.inner_steps, report.inner_gradient_norm
        self.cg_steps, self.cg_residual = report.cg_steps, report.cg_residual
        self.cg_reason, self.is_bound = report.cg_reason, report.is_bound
        parts = report.inner_error, report.linear_error, report.rounding_error
        self.hypergradient_error = sum(parts)
        limit = settings.max_error
        bad = not self.hypergradient_error <= limit
        self.hypergradients += 1
        self.unsolved += bad
        self.unsolved_inner += not report.inner_error <= limit
        self.unsolved_linear += not report.linear_error <= limit
        if self.parent is not None:
            self.parent.record(report, settings)
        elif bad and self.unsolved == 1:
            warnings.warn(_why(report, settings), UnsolvedWarning, stacklevel=2)


def _why(report: Report, settings: Settings) -> str:
    """What is wrong, by the largest part of the error, and what to do."""
    parts = report.inner_error, report.linear_error, report.rounding_error
    error, largest = sum(parts), max(part if part == part else math.inf for part in parts)
    kind = "at most" if report.is_bound else "about"
    if report.inner_error == largest or report.inner_error != report.inner_error:
        what = (
            f"the inner problem is not solved: an inner gradient of norm "
            f"{report.inner_gradient_norm:.2g} after {report.inner_steps} steps of {settings.inner}"
        )
        remedy = "take more steps, or raise l2" if settings.newton else "use inner=Newton()"
        if report.cg_reason == "the inner solve's factor":
            remedy = "scale the features down, or raise l2"
    elif report.linear_error == largest:
        what = (
            f"the linear system is not solved: a relative residual of {report.cg_residual:.2g} "
            f"after {report.cg_steps} steps of {settings.linear} ({report.cg_reason})"
        )
        remedy = REMEDIES.get(report.cg_reason, "raise l2")
    else:
        what = "the precision does not suffice for features of this size and this l2"
        remedy = "use float64, scale the features down, or raise l2"
    return (
        f"{what}; expected a relative error of the hypergradient of at most "
        f"{settings.max_error:g}, got {kind} {error:.2g}: {remedy} "
        "(said once; .diagnostics counts the rest)"
    )
