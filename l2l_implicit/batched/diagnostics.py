"""What T hypergradients can be trusted to be: tensors on the device, numbers only when read."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from l2l_implicit.batched.inner_solvers import InnerSolution
from l2l_implicit.batched.linear_solve import REASONS, BatchedSolution
from l2l_implicit.diagnostics import Diagnostics, Limits
from l2l_implicit.linear_solvers.solution import NON_FINITE, LinearSolution


class BatchedDiagnostics:
    """Per-task diagnostics of one batch, each a tensor ``[T]``.

    Reading the tensors waits for nothing; `tasks` does, once.

    Args:
        inner: where the inner solver ended.
        residual: the inner gradient's norm relative to its largest natural scale.
        limits: above these a task counts as unsolved.
        total: the head's own diagnostics, to which `tasks` adds each task once.

    Attributes:
        inner_steps, inner_gradient_norm, inner_residual: as in `l2l_implicit.Diagnostics`.
        cg_steps, cg_residual, cg_reason: of the linear solve, None before ``backward()``;
            reasons are indices into `l2l_implicit.batched.linear_solve.REASONS`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.batched import BatchedImplicitHead
        >>> head, y = BatchedImplicitHead(nn.Linear(10, 5), lr=0.1), torch.arange(25) % 5
        >>> adapted = head(torch.randn(8, 25, 10, requires_grad=True), y.expand(8, 25))
        >>> adapted(torch.randn(8, 15, 10)).square().mean().backward()
        >>> adapted.diagnostics.inner_residual.shape
        torch.Size([8])
        >>> [task.unsolved_inner for task in adapted.diagnostics.tasks()]
        [0, 0, 0, 0, 0, 0, 0, 0]
        >>> head.diagnostics.hypergradients
        8
    """

    def __init__(
        self, inner: InnerSolution, residual: Tensor, limits: Limits, total: Diagnostics
    ) -> None:
        self.inner_steps, self.inner_gradient_norm = inner.steps, inner.norm
        self.inner_residual = residual
        self.cg_steps: Tensor | None = None
        self.cg_residual: Tensor | None = None
        self.cg_reason: Tensor | None = None
        self._limits, self._total = limits, total
        self._unread: list[BatchedSolution] = []
        self._tasks = [Diagnostics(parent=total) for _ in range(len(residual))]

    def record(self, linear: BatchedSolution) -> None:
        """Take note of one linear solve; the answer itself is not kept."""
        self._unread.append(linear._replace(solution=linear.solution.new_empty(0)))
        self.cg_steps, self.cg_residual = linear.steps, linear.relative_residual
        self.cg_reason = linear.reason

    def tasks(self) -> list[Diagnostics]:
        """The package's diagnostics, one a task; waits for the device.

        The first call after a ``backward()`` adds its T hypergradients to the head's own
        diagnostics and warns like the head that adapts one task at a time.

        Raises:
            FloatingPointError: if a task's inner gradient or linear system was not finite.
        """
        self.check_inner()
        unread, self._unread = self._unread, []
        for linear in unread:
            self._record(linear)
        return self._tasks

    def check_inner(self) -> None:
        """Raise FloatingPointError unless every inner gradient is finite; waits for the device."""
        _finite(
            self.inner_gradient_norm.isfinite(), "inner gradient", "smaller lr, or step='newton'"
        )

    def check_linear(self) -> None:
        """The same for the last linear solve."""
        if self.cg_reason is not None:
            good = self.cg_reason != REASONS.index(NON_FINITE)
            _finite(good, "linear system", "or raise l2")

    def _record(self, linear: BatchedSolution) -> None:
        self.check_linear()
        columns = (
            self.inner_steps,
            self.inner_gradient_norm,
            self.inner_residual,
            linear.steps,
            linear.relative_residual,
            linear.reason,
        )
        rows = torch.stack([column.double() for column in columns], 1).tolist()
        nothing = self.inner_residual.new_empty(0)
        for task, row in zip(self._tasks, rows, strict=True):
            steps, norm, residual, products, relative, code = row
            reason = REASONS[int(code)]
            answer = LinearSolution(nothing, int(products), math.nan, relative, reason)
            task.record(int(steps), norm, residual, answer, self._limits)


def _finite(good: Tensor, what: str, remedy: str) -> None:
    bad = (~good).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(
            f"{what}: expected finite numbers, got nan or infinity in tasks {bad}; "
            f"look for nan in the data or the losses, {remedy}"
        )
