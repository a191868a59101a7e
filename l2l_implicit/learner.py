"""`ImplicitCGHead`: learn2learn's MAML contract with an implicit hypergradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.adaptation import ImplicitLearner
from l2l_implicit.diagnostics import Diagnostics
from l2l_implicit.inner_steps import GradientStep, NewtonStep
from l2l_implicit.linear_solve import LinearSolution, Matvec, conjugate_gradient
from l2l_implicit.linearization import Linearization
from l2l_implicit.regularizer import SquaredDistance
from l2l_implicit.task import Task


class ImplicitCGHead(ImplicitLearner):
    r"""Adapts a module's parameters phi; its hypergradient needs no history of the inner loop.

    Takes the place of ``learn2learn.algorithms.MAML(head, lr)``. The inner problem is

    .. math:: \min_\phi \; \text{loss}(\theta, \phi) + \tfrac{l_2}{2} \|\phi - a\|^2

    and ``backward()`` on a loss of the adapted learner leaves on theta the hypergradient of
    Yang et al. (2025), eq. (8). Theta is whatever the losses depend on besides phi: the features
    passed to the learner, parameters used beside it, the anchor ``a``, ``l2``.

    Args:
        model: the module whose parameters are phi, usually the last linear layer.
        lr: inner step size :math:`\lambda_\phi`; ``step='newton'`` needs it only as a fallback.
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
            step.
        cg_tol: relative residual at which conjugate gradient stops.
        step: ``'newton'`` or ``'gradient'`` (the papers').
        warm_start: remember phi and v of each task named in ``clone(task=...)`` and start from
            them at its next visit (Algorithm 1, line 6; Subroutine 1, line 2).
        inner_tol: largest relative inner gradient at the linearization point that counts as
            solved.

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
        lr: float,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        l2: float | Tensor = 0.1,
        anchor: str = "zero",
        cg_steps: int = 20,
        cg_tol: float = 1e-4,
        step: str = "newton",
        warm_start: bool = False,
        inner_tol: float = 0.1,
    ) -> None:
        super().__init__(model, lr, first_order, allow_unused, allow_nograd)
        checks.settings(model, lr, l2, anchor, cg_steps, cg_tol, step, inner_tol)
        self.lr = float(lr)
        self.l2, self.anchor, self.step = l2, anchor, step
        self.cg_steps, self.cg_tol, self.inner_tol = cg_steps, cg_tol, inner_tol
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
        task = self._task
        if task.stepper is None:
            task.stepper = (
                NewtonStep(self.lr, self.cg_steps, tol=0.1 * self.cg_tol)
                if self.step == "newton"
                else GradientStep(self.lr)
            )
        return task.stepper(at)

    def linear_solve(self, hvp: Matvec, b: Tensor, start: Tensor | None) -> LinearSolution:
        """Solve ``hvp(v) = b`` for the backward pass, shapes ``[n]``, perhaps from a ``start``."""
        return conjugate_gradient(hvp, b, start=start, max_steps=self.cg_steps, tol=self.cg_tol)

    def _closed_form(self, anchor: Sequence[Tensor]) -> SquaredDistance | None:
        if type(self).regularizer is not ImplicitCGHead.regularizer:
            return None
        checks.coefficient(self.l2)
        return SquaredDistance(self.l2, anchor or None)

    def _needs_hvp(self) -> bool:
        return self.step == "newton" or type(self).inner_step is not ImplicitCGHead.inner_step
