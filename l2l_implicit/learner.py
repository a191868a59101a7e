"""`ImplicitCGHead`: learn2learn's MAML contract with an implicit hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.adaptation import ImplicitLearner
from l2l_implicit.diagnostics import Diagnostics
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_problem.regularizer import SquaredDistance
from l2l_implicit.inner_solvers.gradient_descent import GradientStep, InnerStep
from l2l_implicit.inner_solvers.lbfgs import LBFGSStep
from l2l_implicit.inner_solvers.newton import NewtonStep
from l2l_implicit.linear_solvers.conjugate_gradient import conjugate_gradient
from l2l_implicit.linear_solvers.direct_solve import direct_solve
from l2l_implicit.linear_solvers.neumann_series import neumann_series
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec
from l2l_implicit.task import Task


class Limits(TypedDict):
    """What the iterative linear solvers are told alike."""

    start: Tensor | None
    max_steps: int
    tol: float


class ImplicitCGHead(ImplicitLearner):
    r"""Adapts a module's parameters phi; its hypergradient needs no history of the inner loop.

    Takes the place of ``learn2learn.algorithms.MAML(head, lr)``. The inner problem is

    .. math:: \min_\phi \; \text{loss}(\theta, \phi) + \tfrac{l_2}{2} \|\phi - a\|^2

    and ``backward()`` on a loss of the adapted learner leaves on theta the hypergradient of
    Yang et al. (2025), eq. (8). Theta is whatever the losses depend on besides phi: the features
    passed to the learner, parameters used beside it, the anchor ``a``, ``l2``.

    Args:
        model: the module whose parameters are phi, usually the last linear layer.
        lr: inner step size :math:`\lambda_\phi`, or ``'auto'``: 1 over the largest curvature,
            estimated where the task starts and again where the objective rises. ``'newton'`` needs
            it only as a fallback, ``'lbfgs'`` not at all.
        first_order: learn2learn's FOMAML instead: plain gradient steps of size ``lr`` on the loss
            itself, the gradient at the adapted point; regulariser and solver stand idle.
        allow_unused: let parameters be absent from the loss. Defaults to ``allow_nograd``.
        allow_nograd: adapt only the parameters that require grad.
        l2: strength of the regulariser; a scalar tensor that requires grad is meta-learned (its
            hypergradient is exact as long as it stays a leaf; keep it positive).
        anchor: ``'zero'``: a = 0 (Yang et al.; the module's initial value is where the inner
            solver starts, and its hypergradient is exactly zero); ``'init'``: a is the module's
            initial value, which is meta-learned (Rajeswaran et al.).
        cg_steps: the most conjugate gradient steps N, in the backward pass and within one Newton
            step; the number of terms of a Neumann series.
        cg_tol: relative residual at which conjugate gradient and the series stop.
        step: the inner solver. ``'newton'``: Newton-CG with a line search (Hessian-free);
            ``'gradient'``: gradient descent (the papers'); ``'lbfgs'``: torch's, with a strong
            Wolfe line search, which needs ``adapt(closure)`` unless the loss is a cross-entropy or
            squared error of a linear head. Or one of your own: an `InnerStep`, or what makes a new
            one for each task when called without arguments.
        warm_start: remember phi and v of each task named in ``clone(task=...)`` and start from
            them at its next visit (Algorithm 1, line 6; Subroutine 1, line 2).
        inner_tol: largest relative inner gradient at the linearization point that counts as
            solved.
        stop_tol: relative inner gradient at which the inner solver stops; None: ``cg_tol / 10``,
            and never for ``'gradient'``, of which the papers prescribe K steps.
        solver: of the linear system in the backward pass. ``'cg'``: conjugate gradient;
            ``'neumann'``: truncated Neumann series; ``'direct'``: dense, for at most 4096 unknowns
            (parameters, or samples times classes of a linear head in closed form).
        neumann_alpha: step size of the series; None: 1 over the largest curvature, estimated.
        damping: added to the diagonal of the linear system in the backward pass, which is then
            ``(H + damping I) v = b``. 0 is the exact hypergradient at a minimum. Where the inner
            problem is not convex and not solved, H is often indefinite and the exact ``v`` is
            noise of any size: raise it until `diagnostics` counts few unsolved systems.

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
        >>> for _ in range(10):
        ...     learner.adapt(loss(learner(h), y))
        >>> loss(learner(h), y).backward()
        >>> features.weight.grad.shape
        torch.Size([10, 20])
        >>> head.diagnostics.cg_reason
        'converged'
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | str,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        l2: float | Tensor = 0.1,
        anchor: str = "zero",
        cg_steps: int = 20,
        cg_tol: float = 1e-4,
        step: str | InnerStep | Callable[[], InnerStep] = "newton",
        warm_start: bool = False,
        inner_tol: float = 0.1,
        stop_tol: float | None = None,
        solver: str = "cg",
        neumann_alpha: float | None = None,
        damping: float = 0.0,
    ) -> None:
        super().__init__(model, lr, first_order, allow_unused, allow_nograd)
        checks.model_and_lr(model, lr, first_order)
        checks.coefficient(l2)
        checks.choice("anchor", anchor, ("zero", "init"))
        checks.inner_solver(step, stop_tol, inner_tol)
        checks.linear_solver(solver, cg_steps, cg_tol, neumann_alpha, damping)
        self.lr = lr if isinstance(lr, str) else float(lr)
        self.l2, self.anchor, self.step = l2, anchor, step
        self.cg_steps, self.cg_tol, self.solver = cg_steps, cg_tol, solver
        self.inner_tol, self.stop_tol, self.neumann_alpha = inner_tol, stop_tol, neumann_alpha
        self.damping = float(damping)
        self.diagnostics = Diagnostics()
        self._memory = {} if warm_start else None
        self._task = Task(key=None, initial=list(model.parameters()))

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
        """The next phi, shape ``[n]``, from the linearization at the present one."""
        return self._stepper()(at)

    def linear_solve(self, hvp: Matvec, b: Tensor, start: Tensor | None) -> LinearSolution:
        """Solve ``hvp(v) = b`` for the backward pass, shapes ``[n]``, perhaps from a ``start``.

        The products have ``damping`` in them already.
        """
        if self.solver == "direct":
            return direct_solve(hvp, b)
        limits = Limits(start=start, max_steps=self.cg_steps, tol=self.cg_tol)
        if self.solver == "neumann":
            return neumann_series(hvp, b, alpha=self.neumann_alpha, **limits)
        return conjugate_gradient(hvp, b, **limits)

    def _stepper(self) -> InnerStep:
        """The task's inner solver, made at its first step."""
        task = self._task
        if task.stepper is None:
            task.stepper = self._new_stepper()
        return task.stepper

    def _new_stepper(self) -> InnerStep:
        tol = 0.1 * self.cg_tol if self.stop_tol is None else self.stop_tol
        if self.step == "newton":
            return NewtonStep(None if isinstance(self.lr, str) else self.lr, self.cg_steps, tol)
        if self.step == "lbfgs":
            return LBFGSStep(tol)
        if self.step == "gradient":
            return GradientStep(self.lr, self.stop_tol)
        own = cast(Any, self.step)
        return own() if checks.makes_a_step(own) else own

    def _closed_form(self, anchor: Sequence[Tensor]) -> SquaredDistance | None:
        if type(self).regularizer is not ImplicitCGHead.regularizer:
            return None
        checks.coefficient(self.l2)
        return SquaredDistance(self.l2, anchor or None)

    def _needs_hvp(self) -> bool:
        if type(self).inner_step is not ImplicitCGHead.inner_step:
            return True
        return getattr(self._stepper(), "needs_hvp", True)

    def _own_step_is_known(self) -> bool:
        base = type(self).inner_step is ImplicitCGHead.inner_step
        return base and (isinstance(self.step, str) or checks.makes_a_step(self.step))

    def _own_linear_solve(self) -> bool:
        return type(self).linear_solve is not ImplicitCGHead.linear_solve
