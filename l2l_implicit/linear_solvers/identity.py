"""The identity in place of the inverse: one-step differentiation, a baseline."""

from dataclasses import dataclass

from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.linear_solvers.solution import LinearSolution, Matvec, applied_once


@dataclass(frozen=True)
class Identity:
    r"""One-step differentiation: :math:`v = \alpha b`, the derivative of the last inner step alone.

    A gradient step :math:`\phi - \alpha \nabla g` has the derivative :math:`-\alpha
    \nabla^2_{\theta\phi} g` in theta where :math:`\phi` is held fixed: that is eq. (8) with
    :math:`v = \alpha b`. At the minimum its relative error in v is at most the step's contraction
    rate :math:`\rho = \max_i |1 - \alpha \lambda_i|`, so it is a poor approximation of an
    ill-conditioned problem. (The T1-T2 method is this, with :math:`\alpha` the inner step size;
    Jacobian-free backpropagation and SAMA take the identity itself, :math:`\alpha = 1`.)

    The derivative of a Newton step is the implicit one: there :math:`\rho = 0`. A linear head that
    `Newton` has solved brings that step's factor, which is taken.

    One product is spent, for the residual alone.

    Args:
        step_size: :math:`\alpha`: the inner step size, for the derivative of a gradient step.
        damping: added to the diagonal of the system of which the residual is reported.

    References:
        Bolte, Pauwels, Vaiter (2023), One-step differentiation of iterative algorithms; Luketina
        et al. (2016); Fung et al. (2022), JFB; Choe et al. (2023), SAMA.

    Example:
        >>> import torch
        >>> from l2l_implicit import Identity
        >>> answer = Identity(0.5).solve(lambda p: 2.0 * p, torch.tensor([[1.0, 2.0]]))
        >>> answer.solution, answer.relative_residual
        (tensor([[0.5000, 1.0000]]), tensor([0.]))
    """

    step_size: float = 1.0
    damping: float = 0.0
    takes_factor = True

    def __post_init__(self) -> None:
        checks.positive("Identity: step_size", self.step_size)
        checks.not_negative("Identity: damping", self.damping)

    def solve(self, hvp: Matvec, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        """``step_size * b``, ``[T, n]``, with the residual that it leaves."""
        return applied_once(hvp, b, lambda right: right * self.step_size, {})
