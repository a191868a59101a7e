"""What a learner can say of its last task, and of how often something was not solved."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field

from l2l_implicit.linear_solvers.solution import LinearSolution


class UnsolvedWarning(UserWarning):
    """The inner problem or the linear system was not solved well enough to trust eq. (8).

    Given once by each learner; `Diagnostics` counts every case.

    Example:
        >>> import warnings
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitCGHead, UnsolvedWarning
        >>> head = ImplicitCGHead(nn.Linear(10, 5), lr=0.01, step="gradient")
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


@dataclass
class Diagnostics:
    """The last hypergradient's diagnostics; on a parent, those of its last clone to be used.

    Attributes:
        inner_steps: calls of ``adapt`` (or steps within one) before the linearization.
        inner_gradient_norm: norm of the inner objective's gradient at the linearization point.
        inner_residual: the same, relative to its largest natural scale (see
            `ImplicitCGHead.adapt`); near 0 for a solved inner problem.
        cg_steps: Hessian-vector products of the last linear solve.
        cg_residual: relative residual of the linear system.
        cg_reason: why the linear solver stopped.
        hypergradients: how many were computed.
        unsolved_inner: how many of them at a point where the inner problem was not solved.
        unsolved_linear: how many with a linear system that was not solved.

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
        >>> head.diagnostics.hypergradients, head.diagnostics.unsolved_inner
        (3, 0)
        >>> head.diagnostics.inner_residual < 1e-4
        True
    """

    inner_steps: int = 0
    inner_gradient_norm: float = math.nan
    inner_residual: float = math.nan
    cg_steps: int = 0
    cg_residual: float = math.nan
    cg_reason: str = ""
    hypergradients: int = 0
    unsolved_inner: int = 0
    unsolved_linear: int = 0
    parent: Diagnostics | None = field(default=None, repr=False, compare=False)

    def record(
        self, steps: int, norm: float, residual: float, linear: LinearSolution, limits: Limits
    ) -> None:
        """Take note of one hypergradient, here and on every parent; warn of the first bad one."""
        self.inner_steps, self.inner_gradient_norm, self.inner_residual = steps, norm, residual
        self.cg_steps, self.cg_residual = linear.steps, linear.relative_residual
        self.cg_reason = linear.reason
        self.hypergradients += 1
        bad_inner = not residual <= limits.inner
        bad_linear = not linear.relative_residual <= limits.linear
        self.unsolved_inner += bad_inner
        self.unsolved_linear += bad_linear
        if self.parent is not None:
            self.parent.record(steps, norm, residual, linear, limits)
            return
        if bad_inner and self.unsolved_inner == 1:
            _warn_inner(steps, residual, limits.inner)
        if bad_linear and self.unsolved_linear == 1:
            _warn_linear(linear, limits.linear)


@dataclass(frozen=True)
class Limits:
    """Above these relative residuals a hypergradient counts as unsolved."""

    inner: float
    linear: float


def _warn_inner(steps: int, residual: float, limit: float) -> None:
    warnings.warn(
        f"the inner problem is not solved: expected a relative inner gradient of at most {limit:g} "
        f"at the linearization point, got {residual:.2g} after {steps} steps, so the hypergradient "
        "is inexact; use step='newton', more steps, a smaller lr or a larger l2 "
        "(said once; .diagnostics counts the rest)",
        UnsolvedWarning,
        stacklevel=2,
    )


def _warn_linear(linear: LinearSolution, limit: float) -> None:
    warnings.warn(
        f"the linear system is not solved: expected a relative residual of at most {limit:g}, got "
        f"{linear.relative_residual:.2g} after {linear.steps} steps ({linear.reason}), so the "
        "hypergradient is inexact; raise cg_steps, l2 or damping "
        "(said once; .diagnostics counts the rest)",
        UnsolvedWarning,
        stacklevel=2,
    )
