"""`BatchedImplicitHead`: a linear head adapted to T tasks at once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.batched.check_input import (
    check_head,
    check_queries,
    check_settings,
    check_solver,
    check_support,
)
from l2l_implicit.batched.diagnostics import BatchedDiagnostics
from l2l_implicit.batched.implicit_diff import BatchedImplicitSolution, Solved, flat_head
from l2l_implicit.batched.inner_solvers import InnerSolution, gradient_descent, newton
from l2l_implicit.batched.linear_solve import LARGEST_DIRECT, LinearSolver, asking_is_free
from l2l_implicit.batched.losses import LOSSES, SupportLoss
from l2l_implicit.batched.objective import LinearObjective
from l2l_implicit.diagnostics import Diagnostics, Limits
from l2l_implicit.learner import ImplicitCGHead

_LINEAR_LIMIT = 0.1  # as in ImplicitCGHead
_TINY = 1e-30


class AdaptedHeads:
    """T adapted linear heads, with their implicit gradient.

    Attributes:
        weight: ``[T, k, d]``.
        bias: ``[T, k]``, or None.
        diagnostics: of each task.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.batched import BatchedImplicitHead
        >>> head, y = BatchedImplicitHead(nn.Linear(10, 5), lr=0.1), torch.arange(25) % 5
        >>> adapted = head(torch.randn(8, 25, 10), y.expand(8, 25))
        >>> adapted.weight.shape, adapted.bias.shape
        (torch.Size([8, 5, 10]), torch.Size([8, 5]))
        >>> adapted(torch.randn(8, 15, 10)).shape
        torch.Size([8, 15, 5])
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, diagnostics: BatchedDiagnostics
    ) -> None:
        self.weight, self.bias, self.diagnostics = weight, bias, diagnostics

    def __call__(self, query: Tensor) -> Tensor:
        """Each task's logits for its own features: ``[T, q, d] -> [T, q, k]``.

        In the heads' precision, under autocast too.
        """
        check_queries(query, self.weight)
        with torch.autocast(query.device.type, enabled=False):
            logits = torch.bmm(query.to(self.weight.dtype), self.weight.transpose(1, 2))
            return logits if self.bias is None else logits + self.bias.unsqueeze(1)


class BatchedImplicitHead(nn.Module):
    r"""`ImplicitCGHead` for a linear head and T tasks at once: the same numbers, no loop.

    The inner problems, solver by solver, are those of `ImplicitCGHead.adapt` with a closure; the
    number of operations does not depend on T, and nothing waits for the device. All of it runs in
    float32 (float64 for float64 features), whatever autocast says.

    Args:
        model: the linear head; its parameters are each task's start.
        lr, l2, anchor, cg_steps, cg_tol, inner_tol: as in `ImplicitCGHead`; lr a number.
        step: ``'newton'`` or ``'gradient'``.
        stop_tol: relative inner gradient at which ``'newton'`` stops; None: ``cg_tol / 10``.
        steps: the number K of inner steps; with ``step='newton'``, the most.
        loss: the support loss, ``'cross_entropy'`` or ``'squared_error'``.
        reduction: ``'mean'`` or ``'sum'`` over a task's support set, as in torch.
        linear_solver: ``'cg'``: conjugate gradient, as in `ImplicitCGHead`; ``'direct'``:
            Cholesky in the dimension of the support examples (needs l2 > 0); ``'auto'``:
            ``'direct'`` where that system has at most 512 rows.
        ask_every: on a GPU, iterations between two looks at whether every task is done (each
            waits for the device, and may save the iterations that remain); 0: never.

    Raises:
        ValueError, TypeError: for a setting out of its range, in one line.

    References:
        Yang, Ma, Yu (2025), Algorithm 1; Rajeswaran et al. (2019), Algorithm 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.batched import BatchedImplicitHead
        >>> head = BatchedImplicitHead(nn.Linear(10, 5), lr=0.1)
        >>> features = torch.randn(8, 50, 10, requires_grad=True)  # 8 tasks, 25 + 25 images
        >>> y = (torch.arange(25) % 5).expand(8, 25)
        >>> adapted = head(features[:, :25], y)
        >>> logits = adapted(features[:, 25:])
        >>> nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
        >>> features.grad.shape
        torch.Size([8, 50, 10])
        >>> len(adapted.diagnostics.tasks())
        8
    """

    def __init__(
        self,
        model: nn.Linear,
        lr: float,
        *,
        steps: int = 20,
        loss: str = "cross_entropy",
        reduction: str = "mean",
        l2: float | Tensor = 0.1,
        anchor: str = "zero",
        cg_steps: int = 20,
        cg_tol: float = 1e-4,
        step: str = "newton",
        inner_tol: float = 0.1,
        stop_tol: float | None = None,
        linear_solver: str = "auto",
        ask_every: int = 0,
    ) -> None:
        super().__init__()
        if type(model) is not nn.Linear:
            raise TypeError(
                f"model: expected a torch.nn.Linear, got {type(model).__name__}; "
                "adapt any other module one task at a time with ImplicitCGHead"
            )
        check_settings(lr, l2, anchor, step, loss, reduction)
        check_solver(linear_solver, l2, cg_steps, ask_every)
        checks.count("steps (K)", steps)
        checks.positive("cg_tol", cg_tol)
        checks.positive("inner_tol", inner_tol)
        if stop_tol is not None:
            checks.positive("stop_tol", stop_tol)
        self.module, self.lr, self.steps = model, float(lr), int(steps)
        self.loss, self.reduction = loss, reduction
        self.l2, self.anchor, self.step = l2, anchor, step
        self.cg_steps, self.cg_tol = cg_steps, cg_tol
        self.inner_tol, self.stop_tol = inner_tol, stop_tol
        self.linear_solver, self.ask_every = linear_solver, int(ask_every)
        self.diagnostics = Diagnostics()

    @classmethod
    def like(
        cls,
        head: ImplicitCGHead,
        *,
        steps: int = 20,
        loss: str = "cross_entropy",
        reduction: str = "mean",
        linear_solver: str = "auto",
        ask_every: int = 0,
    ) -> BatchedImplicitHead:
        """A batched head with the settings of ``head``, its module and its diagnostics.

        ``step='lbfgs'`` becomes ``'newton'``: the minimum is the same. ``solver='direct'`` is
        direct here too; for ``'cg'`` see ``linear_solver``.

        Raises:
            TypeError, ValueError: if ``head`` does what only a loop over tasks can do.
        """
        check_head(head)
        batched = cls(
            head.module,
            0.1 if isinstance(head.lr, str) else head.lr,  # Newton's never needs it where l2 > 0
            steps=steps,
            loss=loss,
            reduction=reduction,
            l2=head.l2,
            anchor=head.anchor,
            cg_steps=head.cg_steps,
            cg_tol=head.cg_tol,
            step="gradient" if head.step == "gradient" else "newton",
            inner_tol=head.inner_tol,
            stop_tol=head.stop_tol,
            linear_solver="direct" if head.solver == "direct" else linear_solver,
            ask_every=ask_every,
        )
        batched.diagnostics = head.diagnostics
        return batched

    def forward(self, features: Tensor, targets: Tensor) -> AdaptedHeads:
        """Adapt to T support sets.

        Args:
            features: ``[T, m, d]``.
            targets: classes ``[T, m]``, or with ``'squared_error'`` numbers ``[T, m, k]``
                (``[T, m]`` for one output).

        Raises:
            ValueError, TypeError: for shapes that do not fit, in one line.
            FloatingPointError: on a CPU, if an inner gradient is not finite; elsewhere
                `BatchedDiagnostics.tasks` raises it.
        """
        weight, bias = self.module.weight, self.module.bias
        check_support(features, targets, self.module, self.loss)
        with torch.autocast(features.device.type, enabled=False):
            dtype = _solver_dtype(features, weight)
            x, w = features.to(dtype), weight.to(dtype)
            c = None if bias is None else bias.to(dtype)
            l2 = self._coefficient(x)
            loss = self._support_loss(targets, x)
            solved = self._solve(x.detach(), loss, l2.detach(), w.detach(), _detached(c))
            new_weight, new_bias = BatchedImplicitSolution.apply(solved, x, l2, w, c)
        return AdaptedHeads(new_weight, None if c is None else new_bias, solved.diagnostics)

    # The pieces of forward().

    @torch.no_grad()
    def _solve(
        self, x: Tensor, loss: SupportLoss, l2: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Solved:
        initial = flat_head(weight, bias)
        anchored = self.anchor == "init"
        objective = LinearObjective(x, loss, l2, initial if anchored else None, bias is not None)
        start = initial.expand(len(x), -1)
        direct = self._is_direct(loss)
        solver = LinearSolver(direct, self.cg_steps, self.cg_tol, self.ask_every)
        if self.step == "newton":
            tol = 0.1 * self.cg_tol if self.stop_tol is None else self.stop_tol
            inner = newton(objective, start, self.steps, self.lr, solver, tol)
        else:
            inner = gradient_descent(objective, start, self.steps, self.lr)
        diagnostics = self._diagnose(objective, inner)
        return Solved(loss, inner, solver, diagnostics, anchored)

    def _diagnose(self, objective: LinearObjective, inner: InnerSolution) -> BatchedDiagnostics:
        pull = objective.l2 * torch.linalg.vector_norm(objective.offset(inner.phi), dim=1)
        residual = inner.norm / torch.maximum(inner.first_norm, pull).clamp(min=_TINY)
        limits = Limits(inner=self.inner_tol, linear=_LINEAR_LIMIT)
        diagnostics = BatchedDiagnostics(inner, residual, limits, self.diagnostics)
        if asking_is_free(inner.phi):  # elsewhere `tasks()` says it
            diagnostics.check_inner()
        return diagnostics

    def _is_direct(self, loss: SupportLoss) -> bool:
        if self.linear_solver == "auto":
            singular = not isinstance(self.l2, Tensor) and self.l2 == 0
            return loss.system_size() <= LARGEST_DIRECT and not singular
        return self.linear_solver == "direct"

    def _coefficient(self, x: Tensor) -> Tensor:
        """l2 as a scalar in the solver's precision, with its history."""
        if isinstance(self.l2, Tensor):
            return self.l2.to(x.device, x.dtype).reshape(())
        return torch.full((), float(self.l2), device=x.device, dtype=x.dtype)

    def _support_loss(self, targets: Tensor, x: Tensor) -> SupportLoss:
        classes = self.module.out_features
        if self.loss == "cross_entropy":
            dense = x.new_zeros(*targets.shape, classes).scatter_(2, targets.unsqueeze(2), 1.0)
        else:
            dense = targets.to(x.dtype).view(*targets.shape[:2], classes)
        return LOSSES[self.loss](dense, self.reduction == "mean")


def _solver_dtype(features: Tensor, weight: Tensor) -> torch.dtype:
    """The wider of the two, and at least float32."""
    return torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
