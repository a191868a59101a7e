"""`ImplicitCGHead`: learn2learn's MAML contract with an implicit hypergradient."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from learn2learn.algorithms import MAML
from learn2learn.utils import clone_module
from torch import Tensor, nn
from torch.linalg import vector_norm

from l2l_implicit import checks
from l2l_implicit.diagnostics import Diagnostics, UnsolvedWarning
from l2l_implicit.implicit_diff import SHAPE, SavedLinearization, attach
from l2l_implicit.inner_problem.boundary import each_tensor, end_of_gradients, marked
from l2l_implicit.inner_problem.gauss_newton import Curvature, Hessian
from l2l_implicit.inner_problem.linear_heads import LinearHeads
from l2l_implicit.inner_problem.linearization import (
    AutogradLinearization,
    FirstDerivatives,
    Linearization,
    Sizes,
    SquaredDistance,
    inner_gradient,
)
from l2l_implicit.inner_problem.passes import noted
from l2l_implicit.inner_problem.recognition import HeadLoss, recognize
from l2l_implicit.inner_problem.second_derivative import (
    KINK,
    NO_SECOND,
    StepTaken,
    gradients,
    on_a_kink,
    products_agree,
)  # fmt: skip
from l2l_implicit.inner_solvers.newton import Newton
from l2l_implicit.inner_solvers.protocol import InnerSolver, InnerStep, descend
from l2l_implicit.linear_solvers import solution
from l2l_implicit.linear_solvers.conjugate_gradient import CG
from l2l_implicit.linear_solvers.solution import LinearSolution, LinearSolver, Matvec, System
from l2l_implicit.mixed_precision import as_now, autocast_enabled, precision_of, without_autocast
from l2l_implicit.module_state import moves_with_each_pass
from l2l_implicit.perturbed import Again, Perturbed
from l2l_implicit.vectors import (
    RandomState,
    buffers_apart,
    flatten,
    shallow_copy,
    substitute,
    unflatten,
)

if TYPE_CHECKING:
    from l2l_implicit.together import AdaptedHeads

Closure = Callable[[], Tensor]

_LOOKS = 40  # steps of loss tensors at which the second derivative is compared, at most
_LOSSES = 20  # different losses of which it is
_PART = 0.45  # of `accuracy` that either solver may leave: a tenth is for rounding


@dataclass(eq=False, slots=True)
class Task:
    """The state of one adaptation."""

    key: Hashable | None  # the task's identity
    initial: list[Tensor]  # the module's parameters before the first step, with their history
    learner: weakref.ref[Any] | None = None  # whose it is
    step: InnerStep | None = None  # the inner solver's state
    made_by: tuple[InnerSolver, float] | None = None  # the solver and step size that it is of
    first_norm: float | Tensor = 0.0  # of the first inner gradient; for tasks together [T]
    steps: int = 0  # inner steps taken
    looks: int = 0  # steps of loss tensors at which the second derivative was compared
    taken: StepTaken | None = None  # the last of them, until it has shown what that is
    missing: float = math.inf  # what it left of the step before
    independent: set[weakref.ref[Tensor]] = field(default_factory=set)  # see `recognize`
    trusted: bool = False
    saved: weakref.ref[SavedLinearization] | None = None  # what the current parameters depend on
    again: Again | None = None  # its closure, where the backward pass calls it
    settings: tuple[Any, ...] = ()  # the learner's, where a loss tensor was solved at once

    def __reduce__(self) -> Any:
        """Saved without its graph: what is read back has the adapted parameters alone."""
        return Task, (self.key, self.initial)

    def release(self) -> None:
        """Drop the linearization that the next one replaces."""
        saved = None if self.saved is None else self.saved()
        if saved is not None:
            saved.linearization = None

    def solved(
        self, loss: HeadLoss, quadratic: SquaredDistance, phi: Sequence[Tensor]
    ) -> LinearHeads | None:
        """The solution of this very problem, if the current parameters are it."""
        saved = self.saved() if self.saved is not None and self.settings else None
        at = None if saved is None else saved.linearization
        if not isinstance(at, LinearHeads):
            return None
        unmoved = torch.equal(at.point[0].to(phi[0].dtype), flatten(phi).detach())
        return at if unmoved and at.quadratic.same(quadratic) and at.known.same(loss) else None


class ImplicitCGHead(MAML):
    r"""Adapts a module's parameters phi; its hypergradient needs no history of the inner loop.

    Takes the place of ``learn2learn.algorithms.MAML(head, lr)``. The inner problem is

    .. math:: \min_\phi \; \text{loss}(\theta, \phi) + \tfrac{l_2}{2} \|\phi - a\|^2

    and ``backward()`` on a loss of the adapted learner leaves on theta the hypergradient of
    Yang et al. (2025), eq. (8). Theta is whatever the losses depend on besides phi: the features
    passed to the learner, parameters used beside it, the anchor ``a``, ``l2``.

    Args:
        model: the module whose parameters are phi, usually the last linear layer.
        lr: inner step size :math:`\lambda_\phi` of `GradientDescent`; `Newton` needs it only as a
            fallback for a module that is no linear head, `LBFGS` not at all.
        first_order: learn2learn's FOMAML instead: plain gradient steps of size ``lr`` on the loss
            itself, the gradient at the adapted point; regulariser and solvers stand idle.
        allow_unused: let parameters be absent from the loss. Defaults to ``allow_nograd``.
        allow_nograd: adapt only the parameters that require grad.
        l2: strength of the regulariser; a scalar tensor that requires grad is meta-learned (its
            hypergradient is exact as long as it stays a leaf; keep it positive).
        anchor: ``'zero'``: a = 0 (Yang et al.; the module's initial value is where the inner
            solver starts, and its hypergradient is exactly zero); ``'init'``: a is the module's
            initial value, which is meta-learned (Rajeswaran et al.). A task may have a value of
            its own in place of the module's: ``clone(anchor=...)``.
        inner: `Newton`, `GradientDescent` (the papers'), `LBFGS`, or an `InnerSolver` of your own.
        linear: the solver of the backward pass's linear system: `CG`, `Neumann`, `Nystrom`,
            `Identity`, `Direct`, a `LinearSolver` of your own; or `Perturbed`: first derivatives.
        curvature: the matrix of that system for any but a linear head: `Hessian` or `GaussNewton`.
        loss: what `adapt_together` minimises: ``nn.CrossEntropyLoss`` or ``nn.MSELoss`` with
            reduction ``mean`` or ``sum``; None: the mean of the one that fits the targets.
        warm_start: remember phi and v of each task named in ``clone(task=...)`` and start from
            them at its next visit (Algorithm 1, line 6; Subroutine 1, line 2).
        accuracy: relative error of the hypergradient, by its bound or estimate, at which the inner
            and the linear solver end, in place of their tolerances; their numbers of steps stay
            the most. None: they end by their own.
        max_error: the error above which it counts as unsolved and the first one warns
            (`UnsolvedWarning`). None: ``accuracy`` where that is given, else 0.01.

    Raises:
        ValueError, TypeError: for a setting out of its range, in one line.

    References:
        Yang, Ma, Yu (2025), Algorithm 1; Rajeswaran et al. (2019), Algorithm 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitCGHead
        >>> features, head = nn.Linear(20, 10), ImplicitCGHead(nn.Linear(10, 5), lr=0.1)
        >>> x, y, loss = torch.randn(25, 20), torch.arange(25) % 5, nn.CrossEntropyLoss()
        >>> learner, h = head.clone(), features(x)
        >>> learner.adapt(loss(learner(h), y))
        >>> loss(learner(h), y).backward()
        >>> features.weight.grad.shape, head.diagnostics.unsolved
        (torch.Size([10, 20]), 0)
    """

    def __init__(
        self, model: nn.Module, lr: float, first_order: bool = False,
        allow_unused: bool | None = None, allow_nograd: bool = False, *,
        l2: float | Tensor = 0.1, anchor: str = "zero",
        inner: InnerSolver = Newton(),  # noqa: B008  (frozen)
        linear: LinearSolver | Perturbed = CG(),  # noqa: B008
        curvature: Curvature = Hessian(),  # noqa: B008
        loss: nn.Module | None = None, warm_start: bool = False,
        accuracy: float | None = None, max_error: float | None = None, **unknown: Any,
    ) -> None:  # fmt: skip
        checks.keywords(type(self).__name__, unknown)
        checks.model(model)
        super().__init__(model, lr, first_order, allow_unused, allow_nograd)
        self.l2, self.anchor, self.inner, self.linear = l2, anchor, inner, linear
        self.curvature, self.loss, self.accuracy = curvature, loss, accuracy
        self.max_error = (accuracy or 0.01) if max_error is None else max_error
        self.warm_start = warm_start
        self.diagnostics = Diagnostics()
        # Each task's phi and v, shape [1, n] each, at the end of its last visit.
        self._memory: dict[Hashable, tuple[Tensor, Tensor]] = {}
        # Of each loss, and of all clones: how often it was met, and its second derivative judged.
        self._compared: dict[int, list[int]] = {}
        checks.hidden_names(self, model)

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings are checked, and used, whenever they are set."""
        if name in checks.SETTINGS and (name, value) != ("module", None):  # as learn2learn begins
            checks.SETTINGS[name](value)
            value = float(value) if name in ("lr", "max_error") else value
            for table in ("_parameters", "_modules"):  # torch keeps another kind out of its place
                self.__dict__.get(table, {}).pop(name, None)
            if name == "module":
                self._task = Task(None, list(value.parameters()))
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From a file, or a deep copy: a task's parameters come without their way to theta."""
        super().__setstate__(state)
        for p in self.module.parameters():
            if p.is_leaf and p.requires_grad and not isinstance(p, nn.Parameter):
                p.register_post_accumulate_grad_hook(self.diagnostics.unreached)

    # Three places to override.

    def regularizer(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        r"""The inner regulariser as a scalar tensor: :math:`(l_2/2) \|\phi - a\|^2`.

        An override may use any tensors; those that require grad are part of theta.

        Args:
            parameters: phi, tensor by tensor.
            anchor: the module's initial value, or zeros with ``anchor='zero'``.
        """
        squares = [(p - a).square().sum() for p, a in zip(parameters, anchor, strict=True)]
        return 0.5 * self.l2 * torch.stack(squares).sum()

    def inner_step(self, at: Linearization) -> Tensor:
        """The next phi, shape ``[1, n]``, from the linearization at the present one."""
        return self._stepper()(at)

    def linear_solve(self, hvp: Matvec, b: Tensor, start: Tensor | None) -> LinearSolution:
        """Solve ``hvp(v) = b`` for the backward pass, shapes ``[T, n]``, perhaps from a ``start``.

        The products have the solver's ``damping`` in them already.
        """
        return self.linear.solve(hvp, b, start)  # type: ignore[union-attr]

    # learn2learn's contract.

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None,
        allow_nograd: bool | None = None, *,
        task: Hashable | None = None, anchor: Tensor | Sequence[Tensor] | None = None,
    ) -> Self:  # fmt: skip
        """A learner for one task, whose parameters are copies of this one's.

        Args:
            first_order, allow_unused, allow_nograd: as in the constructor; None keeps its value.
            task: the task's identity, for ``warm_start``; None starts afresh.
            anchor: a value of this task's own, in place of the module's initial one, to start from
                and as the anchor a: a tensor for each adapted parameter, in their order and shapes.
                The hypergradient reaches what made them (prototypes, a hypernetwork).
        """
        checks.no_transform()
        if self.diagnostics.waiting is not None:
            self.diagnostics.say()
        clone = shallow_copy(self)
        clone._modules["module"] = clone_module(self.module)
        flags = checks.flags(self, first_order, allow_unused, allow_nograd)
        initial, own = list(self.module.parameters()), Diagnostics(parent=self.diagnostics)
        clone.__dict__.update(flags, diagnostics=own, _task=Task(task, initial, weakref.ref(clone)))
        if not torch.is_grad_enabled():  # then copies lose it
            for before, copied in zip(initial, clone.module.parameters(), strict=True):
                copied.requires_grad_(before.requires_grad)
        if anchor is not None:
            clone._begin_at(anchor)
        if clone.warm_start and task in clone._memory:
            phi = checks.inner_parameters(clone.module, clone.allow_nograd)
            if clone._memory[task][0].numel() == sum(map(Tensor.numel, phi)):
                clone._put(clone._memory[task][0], phi)
            else:  # other parameters adapt now
                del clone._memory[task]
        return clone

    def _begin_at(self, anchor: Tensor | Sequence[Tensor]) -> None:
        """Take the task's own initial value and anchor; the module's gets a gradient of zero."""
        phi = checks.inner_parameters(self.module, self.allow_nograd)
        pairs = zip(checks.anchor(anchor, phi), phi, strict=True)
        own = [a.to(p.dtype) + 0.0 * p for a, p in pairs]
        places = dict(zip(map(id, phi), own, strict=True))
        self._task.initial = [places.get(id(p), p) for p in self.module.parameters()]
        substitute(self.module, phi, [a.clone().requires_grad_() for a in own])
        self.anchor = "init"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output; inputs with history are noted as part of theta.

        Under autocast it is computed in the parameters' precision, as is all of `adapt`.
        """
        low = precision_of(self.module)
        dtype = None if low is None else low[1]
        within = torch._C._are_functorch_transforms_active()  # their graphs take no mark
        mark = torch.is_grad_enabled() and not (self.first_order or within)
        change = functools.partial(marked, dtype=dtype, mark=mark)
        args, kwargs = each_tensor(args, change), each_tensor(kwargs, change)
        run, again = self.module, self._task.again
        if again is not None:
            run = functools.partial(again.forward, self.module)
        elif mark and self.curvature.notes_passes and not isinstance(self.linear, Perturbed):
            run = functools.partial(noted, self.module)
        with contextlib.nullcontext() if low is None else torch.autocast(low[0], enabled=False):
            return run(*args, **kwargs)

    def adapt(
        self, loss: Tensor | Closure, first_order: bool | None = None,
        allow_unused: bool | None = None, allow_nograd: bool | None = None, *,
        steps: int | None = None,
    ) -> None:  # fmt: skip
        r"""One inner step from a loss tensor, or ``steps`` of them from a closure.

        What `Newton` does not solve at once takes a step for a loss tensor, linearized where that
        was computed, at :math:`\phi^{K-1}`; with a closure (no arguments, returns the loss of the
        learner as it then is) the linearization is exactly at :math:`\phi^K`.

        Under ``torch.no_grad()`` a closure works and nothing is kept. The steps end before
        ``steps`` where the inner solver has nothing left to do. A linear head's closure is called
        once by `Newton`, else at the first and the last point only; if its data have changed in
        between, the steps are taken once more, with a call for each.

        Args:
            loss: a scalar, or a closure that returns one.
            first_order, allow_unused, allow_nograd: as in the constructor, for this call.
            steps: the number K of steps; with a closure only.

        Raises:
            ValueError: if the loss is no finite scalar that depends on the parameters.
            RuntimeError: if it cannot be differentiated twice.
        """
        flags = checks.flags(self, first_order, allow_unused, allow_nograd)
        first_order, unused, allow_nograd = flags.values()
        checks.adapt(loss, steps)
        task = self._task
        if task.learner is None or task.learner() is not self:  # shared, by clone_module()
            self._task = Task(task.key, task.initial, weakref.ref(self))
        phi = checks.inner_parameters(self.module, allow_nograd)
        saved = self._task.saved
        used = saved is not None and saved() is None and not phi[0].is_leaf  # by a backward()
        if used and self.diagnostics.parent is None:
            warnings.warn(
                "adapt: expected a clone() for each task, got the learner itself again after "
                "backward(): its parameters are the last task's, and an optimizer still holds "
                "those it began with; call clone() first, and adapt the clone",
                stacklevel=2,
            )
        keep, device = torch.is_grad_enabled(), phi[0].device.type
        if not isinstance(loss, Tensor) and autocast_enabled(device):
            loss = as_now(loss, device)
        with torch.enable_grad(), without_autocast(device):
            if first_order:
                self._first_order_steps(loss, phi, unused, steps or 1)
            elif isinstance(loss, Tensor):
                self._adapt_loss(checks.loss(loss), phi, unused, keep)
            else:
                self._adapt_closure(loss, phi, unused, keep, steps or 1)

    def adapt_together(
        self, features: Tensor, targets: Tensor, steps: int = 20,
        anchor: Tensor | Sequence[Tensor] | None = None,
    ) -> AdaptedHeads:  # fmt: skip
        """Adapt this linear head to T tasks at once; the numbers are those of T clones.

        The number of operations does not depend on T.

        Args:
            features: of the support sets, ``[T, m, d]``.
            targets: classes ``[T, m]``, or for the squared error numbers ``[T, m, k]``.
            steps: the most inner steps K; `Newton` solves the problem whatever they are.
            anchor: of each task, as in `clone`: ``[T, k, d]``, and ``[T, k]`` with a bias.

        Returns:
            T adapted heads: call them with query features ``[T, q, d]``.

        Raises:
            ValueError, TypeError: for shapes or settings that do not fit, in one line.
            FloatingPointError: if a task's inner problem has no finite solution.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from l2l_implicit import ImplicitCGHead
            >>> head = ImplicitCGHead(nn.Linear(10, 5), lr=0.1)
            >>> features = torch.randn(8, 50, 10, requires_grad=True)  # 8 tasks, 25 + 25 images
            >>> y = (torch.arange(25) % 5).expand(8, 25)
            >>> adapted = head.adapt_together(features[:, :25], y)
            >>> adapted(features[:, 25:]).shape, adapted.weight.shape
            (torch.Size([8, 25, 5]), torch.Size([8, 5, 10]))
        """
        from l2l_implicit.together import adapt_heads

        several = shallow_copy(self)
        several._task = Task(None, list(self.module.parameters()))
        return adapt_heads(several, features, targets, steps, anchor)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel asks of the module it is to wrap."""
        raise TypeError(checks.WRAPPED.format("DistributedDataParallel", type(self).__name__))

    def _replicate_for_data_parallel(self) -> Any:
        """What DataParallel asks of the module it is to wrap."""
        raise TypeError(checks.WRAPPED.format("DataParallel", type(self).__name__))

    # The pieces of adapt().

    def _adapt_loss(self, loss: Tensor, phi: list[Tensor], unused: bool, keep: bool) -> None:
        task = self._task
        known = self._known(loss, phi)
        exact = self._plain("inner_step") and getattr(self.inner, "at_once", False)
        if known is not None and exact:
            settings = self.anchor, self.inner, self.linear, self.accuracy, self.max_error
            quadratic = self._quadratic(phi, torch.float64)
            there = task.solved(known, quadratic, phi) if keep else None
            if there is None:
                task.release()
                there = self._on_heads(known.heads(phi, quadratic), 1)
            elif there.known.origin == known.origin and task.settings == settings:
                return
            there.sees(known)
            self._install(there.point, phi, there if keep else None)
            self._note(there, [self.diagnostics])
            task.settings = settings
            return
        if known is None and isinstance(self.linear, Perturbed):
            raise TypeError(
                "adapt: expected a closure, which linear=Perturbed() calls again at other "
                "parameters, got a loss tensor that is no cross-entropy or squared error of a "
                "linear head; use adapt(closure, steps=K)"
            )
        task.release()  # before there are two
        at = self._linearize(loss, phi, unused, True, known)
        due = isinstance(at, AutogradLinearization) and self._is_due(at) and self._look(at) is None
        point = self._step(at)
        seldom = task.looks < 20 or task.steps % 8 < 2  # steps get short, and short ones tell
        if due and seldom and task.looks < _LOOKS:
            assert isinstance(at, AutogradLinearization)
            task.taken, task.looks = StepTaken.of(at, point), task.looks + 1
        self._install(point, phi, at if keep else None)
        self._note(at, [self.diagnostics])

    def _adapt_closure(
        self, closure: Closure, phi: list[Tensor], unused: bool, keep: bool, steps: int
    ) -> None:
        objective = _ClosureObjective(self, closure, phi, unused)
        before = self._task.steps, self._task.first_norm
        try:
            at: Linearization | None = self._solve_heads(objective, steps)
            if at is None:
                self._task.steps, self._task.first_norm = before
                at = descend(
                    objective.linearize, objective.evaluate, self._step, objective.start,
                    steps=steps, keep=keep,
                    hvp=not self._plain("inner_step")
                    or getattr(self._stepper(), "needs_hvp", True),
                )  # fmt: skip
                if keep and isinstance(at, AutogradLinearization) and at.differentiable:
                    self._compare(at, objective)
        except BaseException:
            substitute(self.module, objective.phi, phi)
            self._task.steps, self._task.first_norm = before
            raise
        self._install(at.point, objective.phi, at if keep else None, objective)
        self._note(at, [self.diagnostics])
        if not keep:
            self.diagnostics.say()

    def _solve_heads(self, objective: _ClosureObjective, steps: int) -> LinearHeads | None:
        """The end of the inner loop of a closure whose loss is one of a linear head; else None."""
        at_once = self._plain("inner_step") and getattr(self.inner, "at_once", False)
        start = flatten(objective.phi).detach().unsqueeze(0)
        known = self._known(objective.loss(start), objective.phi)
        if known is None:
            return None
        quadratic = self._quadratic(objective.phi, torch.float64)
        there = self._on_heads(known.heads(objective.phi, quadratic), steps)
        if not at_once:  # else what it draws at another call is another problem
            again = self._known(objective.loss(there.point), objective.phi)
            if again is None or not again.same(known):
                objective.fresh = None
                return None  # the closure draws anew each time: it has to be asked at each step
            known = again
        there.sees(known)
        return there

    def _on_heads(self, at: LinearHeads, steps: int) -> LinearHeads:
        """The inner loop of linear heads: their objectives are known everywhere."""
        task, there = self._task, None
        solve = self._plain("inner_step") and getattr(self.inner, "solve_heads", None)
        exact = getattr(self.inner, "at_once", False)  # beyond any accuracy
        if solve and (exact or not self.accuracy):
            there = solve(at, steps, self.lr)
        if there is None:
            points: list[Tensor] = []
            counts: list[int] = []
            before = task.steps
            for t in range(len(at.point)):
                task.step, here = None, at if len(at.point) == 1 else at.task(t)
                for _ in range(steps):
                    point = self._step(here)
                    if point is here.point:
                        break
                    here = here.moved(point)
                points.append(here.point)
                counts.append(task.steps - before - sum(counts))
            task.step = None
            there = here
            if len(points) > 1:
                there = at.moved(torch.cat(points))
                there.steps = counts
        elif there.steps is None:
            task.steps += steps
        elif len(there.steps) == 1:
            task.steps += int(there.steps[0])
        if at.quadratic.strength == 0.0:  # then the error is measured by the first gradient
            first = at.gradient_norm
            task.first_norm = first if len(first) > 1 else task.first_norm or float(first)
        checks.finite_solutions(there.point)
        return there

    def _step(self, at: Linearization) -> Tensor:
        task, norm = self._task, float(at.gradient_norm)
        task.steps += 1
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"inner gradient: expected finite numbers, got norm {norm} at step {task.steps}; "
                "look for nan in the data, smaller lr, or inner=Newton()"
            )
        task.first_norm = task.first_norm or norm
        if self.accuracy is not None:
            at.accuracy = _PART * self.accuracy
            self._note(at)
            if at.errors(at.sizes[0], 0.0, 0.0)[0] <= at.accuracy:
                task.steps -= 1
                return at.point
        phi = self.inner_step(at)
        return phi if phi is at.point else checks.like("inner step", phi, at.point).detach()

    def _stepper(self) -> InnerStep:
        """The task's inner solver, made at its first step."""
        task, now = self._task, (self.inner, self.lr)
        if task.step is None or task.made_by != now:
            task.made_by, task.step = now, self.inner.begin(self.lr)
        return task.step

    def _first_order_steps(
        self, loss: Tensor | Closure, phi: list[Tensor], unused: bool, steps: int
    ) -> None:
        """learn2learn's FOMAML: gradient steps whose own derivative is the identity."""
        for _ in range(steps):
            now = checks.loss(loss if isinstance(loss, Tensor) else loss())
            pairs = zip(phi, inner_gradient(now, phi, unused), strict=True)
            new = [p if g is None else p - self.lr * g for p, g in pairs]
            substitute(self.module, phi, new)
            phi = new

    # The inner problem.

    def _plain(self, name: str) -> bool:
        """Whether a method is this class's own, overridden neither below it nor on the learner."""
        own = getattr(ImplicitCGHead, name)
        return name not in vars(self) and getattr(type(self), name) is own

    def _known(self, loss: Tensor, phi: Sequence[Tensor]) -> HeadLoss | None:
        """The loss as one of a linear head, if the whole objective has a closed form."""
        if self._plain("regularizer"):
            with contextlib.suppress(RuntimeError):  # freed, changed in place: autograd says so
                task = self._task
                found = recognize(loss, phi, task.independent, task.trusted)
                task.trusted |= found is not None
                return found
        return None

    def _quadratic(self, phi: Sequence[Tensor], dtype: torch.dtype) -> SquaredDistance:
        """The regulariser in closed form, which it has unless it is a subclass's own."""
        anchor = self._initial_of(phi) if self.anchor == "init" else []
        return SquaredDistance(self.l2, anchor, dtype)

    def _linearize(
        self, loss: Tensor, phi: list[Tensor], unused: bool, differentiable: bool,
        known: HeadLoss | None, retain: bool = False,
    ) -> Linearization:  # fmt: skip
        if known is not None:
            return known.heads(phi, self._quadratic(phi, torch.float64))
        settings: dict[str, Any] = {"unused": unused}
        if self._plain("regularizer"):
            settings["quadratic"] = self._quadratic(phi, phi[0].dtype)
        else:  # the user's own, which autograd carries like the loss
            anchor = self._initial_of(phi) if self.anchor == "init" else []
            stand_ins = [a.detach().requires_grad_() for a in anchor]
            loss = loss + self.regularizer(phi, stand_ins or [torch.zeros_like(p) for p in phi])
            settings |= {"anchor": anchor, "stand_ins": stand_ins}
        if isinstance(self.linear, Perturbed) and differentiable:
            return FirstDerivatives(loss, phi, **settings)
        kind = Hessian() if isinstance(self.linear, Perturbed) else self.curvature
        settings |= {"differentiable": differentiable, "retain": retain}
        return kind.linearize(loss, phi, **settings)

    def _initial_of(self, phi: Sequence[Tensor]) -> list[Tensor]:
        """The initial values of phi, which may be some of the module's parameters."""
        initial = self._task.initial
        if len(phi) == len(initial):
            return initial
        adapted = {id(p) for p in phi}
        pairs = zip(initial, self.module.parameters(), strict=True)
        return [tensor for tensor, p in pairs if id(p) in adapted]

    # Putting phi into the module.

    def _put(self, point: Tensor, now: Sequence[Tensor]) -> list[Tensor]:
        """Make ``point`` the module's parameters, as leaves: no graph behind them."""
        vector = point.detach()[0].to(now[0].dtype)
        leaves = [*map(Tensor.requires_grad_, unflatten(vector, now))]
        substitute(self.module, now, leaves)
        return leaves

    def _install(
        self, point: Tensor, phi: Sequence[Tensor], at: Linearization | None,
        objective: _ClosureObjective | None = None,
    ) -> None:  # fmt: skip
        """Make ``point`` the module's parameters, with the implicit gradient of ``at``."""
        task = self._task
        if task.saved is not None:
            task.release()
        task.saved, task.again, task.settings = None, None, ()
        if at is None:
            for leaf in self._put(point, phi):
                leaf.register_post_accumulate_grad_hook(self.diagnostics.unreached)
            return
        vector = point.to(phi[0].dtype)
        # Held for a warm start only: the parameters are copies.
        held = vector if self.warm_start else vector.new_empty(0)
        saved = self._saved(at, held, [self.diagnostics])
        zero = self._initial_of(phi) if self.anchor == "zero" else []
        new = attach(saved, vector, [*map(SHAPE, phi)], constants=zero)
        substitute(self.module, phi, new)
        task.saved = weakref.ref(saved)
        if isinstance(at, FirstDerivatives) and objective is not None:
            assert objective.random is not None
            task.again = Again(objective, self.module, new, saved, objective.random)
            at.revisited_by(weakref.ref(task.again))

    def _note(self, at: Linearization, diagnostics: Sequence[Diagnostics] = ()) -> None:
        """Measure each task's inner problem, once, and take note of it."""
        if not at.sizes:
            norm, at.sizes = at.gradient_norm, []
            first = torch.as_tensor(self._task.first_norm, device=norm.device).expand_as(norm)
            columns = map(Tensor.double, (norm, first, *at.scales()))
            for row in torch.stack([*columns], 1).tolist():
                at.sizes.append(Sizes(row[0], row[1], math.nan, 1.0, 0.0, tuple(row[2:])))
        settings = self.max_error, self.inner, self.linear
        steps = [self._task.steps] * len(at.point) if at.steps is None else at.steps
        for mine, taken, sizes in zip(diagnostics, steps, at.sizes, strict=False):
            errors = at.errors(sizes, 0.0, 0.0)[0], math.nan, math.nan
            mine.record(int(taken), 0, None, sizes, errors, at.is_bound, settings)

    # The backward pass.

    def _saved(
        self, at: Linearization, phi: Tensor, diagnostics: Sequence[Diagnostics]
    ) -> SavedLinearization:
        """``at``, with `_solve` on a copy of the learner that has no module.

        A graph that held its learner would hold itself; so it may outlive the learner, as a
        returned loss does.
        """
        bare, task = shallow_copy(self), self._task
        bare._modules["module"] = None
        bare._task = Task(task.key, [], first_norm=task.first_norm, steps=task.steps)
        solve = functools.partial(bare._solve, phi, diagnostics)
        return SavedLinearization(at, solve, self.diagnostics.unreached)

    def _solve(
        self, phi: Tensor, diagnostics: Sequence[Diagnostics], at: Linearization, b: Tensor
    ) -> LinearSolution:
        """The solutions v of eq. (5), and their diagnostics."""
        key, memory = self._task.key, self._memory
        start = memory[key][1].to(b) if self.warm_start and key in memory else None
        damping = float(getattr(self.linear, "damping", 0.0))
        plain = self.linear if self._plain("linear_solve") else None
        if isinstance(at, LinearHeads) and at.solved and getattr(plain, "takes_factor", False):
            answer = at.solve(b, damping)
        elif isinstance(plain, Perturbed):
            assert isinstance(at, LinearHeads | FirstDerivatives)
            answer = plain.respond(self, at, b, start)
        else:
            part = None if self.accuracy is None else _PART * self.accuracy
            answer = self.linear_solve(System(at.hvp, damping, at, part), b, start)
            checks.like("linear solver's solution", getattr(answer, "solution", None), b)
        if solution.NON_FINITE in answer.reason:
            bad = [t for t, reason in enumerate(answer.reason) if reason == solution.NON_FINITE]
            raise FloatingPointError(
                "hypergradient: expected finite products, got nan or infinity in the linear "
                f"system{f' of tasks {bad}' if len(b) > 1 else ''}; look for nan in the data or "
                "the query loss, or raise l2"
            )
        norms = vector_norm(b, dim=1), vector_norm(answer.solution, dim=1)
        columns = [answer.steps, answer.relative_residual, *norms]
        if answer.products_error is not None:
            columns.append(answer.products_error)
        rows = torch.stack([*map(Tensor.double, columns)], 1).tolist()
        steps = [self._task.steps] * len(b) if at.steps is None else at.steps
        tasks = zip(diagnostics, steps, at.sizes, rows, answer.reason, strict=True)
        settings = self.max_error, self.inner, self.linear
        for mine, taken, sizes, (spent, residual, *lengths), reason in tasks:
            sizes = sizes._replace(residual=residual, b=lengths[0], v=lengths[1])
            errors = at.errors(sizes, damping, torch.finfo(phi.dtype).eps)
            errors = errors[0], errors[1], errors[2] + sum(lengths[2:])
            exact = solution.FACTORED, solution.ZERO  # another v is not bounded in theta
            bound = at.is_bound and reason in exact
            mine.record(int(taken), int(spent), reason, sizes, errors, bound, settings)
        if self.warm_start and key is not None:
            memory[key] = phi, answer.solution
        return answer

    # Whether autograd's second derivative is one.

    def _is_due(self, at: AutogradLinearization) -> bool:
        """Whether a loss of these operations is to be compared: at first, then ever more seldom."""
        key, known = hash(tuple(at.operations)), self._compared
        if not at.needs_second or (key not in known and len(known) >= _LOSSES):
            return False
        count = known.setdefault(key, [0, 0])
        count[0] += 1
        due = count[0] >= 2 ** count[1]
        if due and any(map(moves_with_each_pass, self.module.modules())):
            self._say(at, NO_SECOND)
            return False
        return due

    def _look(self, at: AutogradLinearization) -> bool | None:
        """Whether the gradient's change since the last loss tensor is what the products say."""
        taken, self._task.taken = self._task.taken, None
        if taken is None:
            return None
        agrees, self._task.missing = taken.agrees(at, self._task.missing)
        if agrees is not None:
            self._say(at, "" if agrees else NO_SECOND)
        return agrees

    def _compare(self, at: AutogradLinearization, objective: _ClosureObjective) -> None:
        """Compare a product with a difference of gradients, with every buffer left as it was."""
        if not self._is_due(at):
            return

        def evaluate(point: Tensor) -> list[Tensor]:
            with buffers_apart(self.module):  # each from the same state
                there = objective.linearize(point, False, retain=True)
            return gradients(there) if isinstance(there, type(at)) else [there.gradient]

        devices = [at.point.device] if at.point.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            agrees = products_agree(at, evaluate)
            self._note(at)
            solved = at.errors(at.sizes[0], 0.0, 0.0)[0] <= self.max_error  # else that is told
            kink = agrees is None and solved and on_a_kink(at, evaluate)
        self._say(at, KINK if kink else NO_SECOND if agrees is False else "")

    def _say(self, at: AutogradLinearization, wrong: str) -> None:
        """Warn of what is wrong, once a loss; nothing is: compare it more seldom."""
        self._compared[hash(tuple(at.operations))][1] += 60 if wrong else 1
        if wrong:
            warnings.warn(f"{wrong} (said once a loss)", UnsolvedWarning, stacklevel=4)


class _ClosureObjective:
    """The inner objective of a closure: puts phi into the module, calls it, linearizes its loss."""

    def __init__(
        self, learner: ImplicitCGHead, closure: Closure, phi: list[Tensor], unused: bool
    ) -> None:
        self.phi = self._before = phi  # the tensors that the module holds now, and held before
        self._learner, self._closure, self._unused = learner, closure, unused
        self.fresh: tuple[Tensor, Tensor] | None = None  # a point and the loss there, not used yet
        self.random: RandomState | None = None  # before the last call, where it is to come again

    def loss(self, point: Tensor) -> Tensor:
        """The loss at ``point``, shape ``[1, n]``."""
        self.phi = self._learner._put(point, self.phi)
        for leaf in self.phi:  # for the closure's own backward(), or that of what it keeps
            leaf.register_post_accumulate_grad_hook(end_of_gradients)
        if isinstance(self._learner.linear, Perturbed):
            self.random = RandomState(point.device)
        loss = checks.loss(self._closure())
        self.fresh = point, loss
        return loss

    def start(self) -> Tensor:
        """Where the learner stood before, shape ``[1, n]``."""
        return self.fresh[0] if self.fresh else flatten(self._before).detach().unsqueeze(0)

    def linearize(self, point: Tensor, differentiable: bool, retain: bool = False) -> Linearization:
        """The linearization at ``point``; without products unless wanted."""
        fresh, self.fresh = self.fresh, None
        loss = fresh[1] if fresh is not None and fresh[0] is point else self.loss(point)
        self.fresh, fresh = None, None
        known = self._learner._known(loss, self.phi)
        return self._learner._linearize(
            loss, self.phi, self._unused, differentiable, known, retain
        )

    def evaluate(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The objective and its gradient at ``point``, shapes ``[1]``, ``[1, n]``."""
        at = self.linearize(point, False)
        return at.objective, at.gradient
