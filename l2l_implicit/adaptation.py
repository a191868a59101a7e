"""How a learner adapts: learn2learn's ``clone``, ``forward`` and ``adapt``, without a history."""

from __future__ import annotations

import functools
import math
import weakref
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import torch
from learn2learn.utils import clone_module
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.diagnostics import Diagnostics, Limits
from l2l_implicit.implicit_diff import Cell, Solve, attach
from l2l_implicit.inner_problem.boundary import map_tensors, mark_boundaries
from l2l_implicit.inner_problem.linear_head import LinearHeadLinearization
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_problem.support_features import SupportFeatures
from l2l_implicit.inner_solvers.first_order import first_order_steps
from l2l_implicit.inner_solvers.inner_loop import Closure, ClosureObjective, descend
from l2l_implicit.linear_solvers.solution import NON_FINITE, LinearSolution, Matvec, damped
from l2l_implicit.mixed_precision import as_now, precision_of, widened, without_autocast
from l2l_implicit.objective import InnerObjective
from l2l_implicit.task import Memory, Remembered, Task
from l2l_implicit.vectors import flatten, shallow_copy, substitute

Self = TypeVar("Self", bound="ImplicitLearner")

LINEAR_LIMIT = 0.1
_TINY = 1e-30


class ImplicitLearner(InnerObjective):
    """The machinery of `ImplicitCGHead`, which says what it adapts with."""

    inner_tol: float
    damping: float
    diagnostics: Diagnostics
    _memory: Memory | None

    @abstractmethod
    def inner_step(self, at: Linearization) -> Tensor:
        """The next phi."""

    @abstractmethod
    def linear_solve(self, hvp: Matvec, b: Tensor, start: Tensor | None) -> LinearSolution:
        """The solution of ``hvp(v) = b``."""

    @abstractmethod
    def _needs_hvp(self) -> bool:
        """Whether `inner_step` wants Hessian-vector products."""

    @abstractmethod
    def _own_step_is_known(self) -> bool:
        """Whether `inner_step` has no state but the task's ``stepper``."""

    @abstractmethod
    def _own_linear_solve(self) -> bool:
        """Whether `linear_solve` is a subclass's, which expects the system as it is."""

    def clone(
        self: Self,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        *,
        task: Hashable | None = None,
    ) -> Self:
        """A learner for one task, whose parameters are copies of this one's.

        Args:
            first_order, allow_unused, allow_nograd: as in the constructor; None keeps its value.
            task: the task's identity, for ``warm_start``; None starts afresh.
        """
        clone = shallow_copy(self)
        clone.module = clone_module(self.module)
        clone.first_order = self.first_order if first_order is None else first_order
        clone.allow_unused = self.allow_unused if allow_unused is None else allow_unused
        clone.allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        clone.diagnostics = Diagnostics(parent=self.diagnostics)
        clone._task = Task(key=task, initial=list(self.module.parameters()))
        for initial, copied in zip(clone._task.initial, clone.module.parameters(), strict=True):
            copied.requires_grad_(initial.requires_grad)  # clones made under no_grad() lose it
        clone._recall()
        return clone

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output; inputs with history are noted as part of theta.

        Under autocast it is computed in the parameters' precision, as is all of `adapt`.
        """
        low = precision_of(self.module)
        dtype = None if low is None else low[1]
        if torch.is_grad_enabled() and not self.first_order:
            args, kwargs = mark_boundaries(args, dtype), mark_boundaries(kwargs, dtype)
        elif low is not None:
            args, kwargs = map_tensors(lambda t: widened(t, dtype), (args, kwargs))
        if low is None:
            return self.module(*args, **kwargs)
        with torch.autocast(low[0], enabled=False):
            return self.module(*args, **kwargs)

    def adapt(
        self,
        loss: Tensor | Closure,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
        *,
        steps: int | None = None,
    ) -> None:
        r"""One inner step from a loss tensor, or ``steps`` of them from a closure.

        With a loss tensor the learner is linearized where the loss was computed, at
        :math:`\phi^{K-1}`; with a closure (no arguments, returns the loss of the learner as it
        then is), exactly at :math:`\phi^K`. A linearization whose gradient is not below
        ``inner_tol`` times the larger of its first value and the regulariser's own gradient
        counts as unsolved: the first such hypergradient warns, `diagnostics` counts them.
        Under ``torch.no_grad()`` nothing is kept. With a closure the steps end before ``steps``
        where the gradient has fallen to ``stop_tol`` of its first value; with loss tensors phi
        then stays where it is. A closure whose loss has a closed form (of a linear head) is called
        at the first and the last point only; if its data have changed in between, the steps are
        taken once more, with a call for each.

        Args:
            loss: a scalar, or a closure that returns one.
            first_order, allow_unused, allow_nograd: as in the constructor, for this call.
            steps: the number K of steps; with a closure only.

        Raises:
            ValueError: if the loss is no finite scalar that depends on the parameters.
        """
        first_order = self.first_order if first_order is None else first_order
        allow_nograd = self.allow_nograd if allow_nograd is None else allow_nograd
        unused = self.allow_unused if allow_unused is None else allow_unused
        checks.steps(loss, steps)
        checks.gradients_possible()
        phi = checks.inner_parameters(self.module, allow_nograd)
        keep, device = torch.is_grad_enabled(), phi[0].device.type
        loss = loss if isinstance(loss, Tensor) else as_now(loss, device)
        with torch.enable_grad(), without_autocast(device):
            if first_order:
                losses = (lambda: loss) if isinstance(loss, Tensor) else loss
                first_order_steps(
                    self.module, losses, phi, lr=self.lr, unused=unused, steps=steps or 1
                )
                return
            if isinstance(loss, Tensor):
                self._adapt_loss(checks.loss(loss), phi, unused, keep)
            else:
                self._adapt_closure(loss, phi, unused, keep, steps or 1)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel asks of the module it is to wrap."""
        raise TypeError(
            "DistributedDataParallel: expected a backbone, or a module whose forward() does the "
            f"whole task, got a {type(self).__name__}, whose clone() and adapt() it would not see; "
            "average the hypergradients with l2l_implicit.distributed's Ranks.average"
        )

    # The pieces of adapt().

    def _adapt_loss(self, loss: Tensor, phi: list[Tensor], unused: bool, keep: bool) -> None:
        parts, before = self._recognize(loss, phi), self._task.linearization()
        if isinstance(before, LinearHeadLinearization) and parts is not None:
            if keep and self._task.solved and before.same_problem(parts):
                self._task.steps += 1
                return
            parts = parts.sharing(before.features)
        before = None
        self._task.release()  # before there are two
        at = self._linearize(loss, phi, unused, True, parts)
        self._install(self._step(at), phi, at if keep else None)

    def _adapt_closure(
        self, closure: Closure, phi: list[Tensor], unused: bool, keep: bool, steps: int
    ) -> None:
        features: list[SupportFeatures] = []  # of the evaluation before

        def linearize(loss: Tensor, now: list[Tensor], differentiable: bool) -> Linearization:
            parts = self._recognize(checks.loss(loss), now)
            if parts is not None:
                parts = parts.sharing(*features)
                features[:] = [parts.features]
            return self._linearize(loss, now, unused, differentiable, parts)

        objective = ClosureObjective(closure, phi, self._put, linearize)
        try:
            vector, at = descend(
                objective,
                self._step,
                flatten(p.detach() for p in phi),  # held by nobody else
                steps=steps,
                hvp=self._needs_hvp(),
                keep=keep,
                restart=self._task.restart if self._own_step_is_known() else None,
            )
        except BaseException:
            substitute(self.module, objective.phi, phi)
            raise
        self._install(vector, objective.phi, at if keep else None)

    def _step(self, at: Linearization) -> Tensor:
        task = self._task
        task.steps += 1
        if not math.isfinite(at.gradient_norm):
            raise FloatingPointError(
                f"inner gradient: expected finite numbers, got norm {at.gradient_norm} at step "
                f"{task.steps}; look for nan in the data, smaller lr, or step='newton'"
            )
        task.first_norm = task.first_norm or at.gradient_norm
        phi = self.inner_step(at)
        task.solved = phi is at.point
        return phi if task.solved else phi.detach()

    def _install(self, vector: Tensor, phi: Sequence[Tensor], at: Linearization | None) -> None:
        """Make ``vector`` the module's parameters, with the implicit gradient of ``at``."""
        self._task.release()
        if at is None:
            self._put(vector, phi)
            return
        cell = Cell(at, self._solver(vector))
        zero = self._initial_of(phi) if self.anchor == "zero" else []
        new = attach(cell, vector, phi, constants=zero)
        substitute(self.module, phi, new)
        self._task.cell = weakref.ref(cell)
        self._task.vector, self._task.first = vector, new[0]

    def _solver(self, vector: Tensor) -> Solve:
        """`_solve` on a copy without the module: a graph that held its learner would hold itself.

        The graph is then free to outlive the learner, as a returned loss does.
        """
        bare = shallow_copy(self)
        bare._modules["module"] = None
        bare.__dict__["_task"] = self._task.summary()
        return functools.partial(bare._solve, vector)

    def _solve(self, phi: Tensor, at: Linearization, b: Tensor) -> Tensor:
        """The vector v of eq. (5), and its diagnostics."""
        task, memory = self._task, self._memory
        before = memory.get(task.key) if memory is not None else None
        start = None if before is None else before.v
        if self.damping:
            answer = self.linear_solve(damped(at.hvp, self.damping), b, start)
        elif self._own_linear_solve():
            answer = self.linear_solve(at.hvp, b, start)
        else:
            answer = at.solve(b, self.linear_solve, start)
        if answer.reason == NON_FINITE:
            raise FloatingPointError(
                "hypergradient: expected finite products, got nan or infinity in the linear "
                "system; look for nan in the data or the query loss, or raise l2"
            )
        residual = at.gradient_norm / max(task.first_norm, at.regularizer_norm(), _TINY)
        limits = Limits(inner=self.inner_tol, linear=LINEAR_LIMIT)
        self.diagnostics.record(task.steps, at.gradient_norm, residual, answer, limits)
        if memory is not None and task.key is not None:
            memory[task.key] = Remembered(phi, answer.solution)
        return answer.solution

    def _recall(self) -> None:
        """Start from the phi that this task ended with at its last visit."""
        if self._memory is not None and self._task.key in self._memory:
            phi = checks.inner_parameters(self.module, self.allow_nograd)
            self._put(self._memory[self._task.key].phi, phi)
