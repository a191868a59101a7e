r"""The losses whose inner problem of a linear head has a closed form, for T tasks at once.

With outputs :math:`Z` (``[T, m, k]``) and a scale :math:`s` (1, or 1 over what a mean divides by):

.. math:: \text{cross-entropy:} \quad \nabla_Z = s (P - Y), \quad
          S U = s (P \odot U - P \odot (P \odot U) 1 1^\top)
.. math:: \text{squared error:} \quad \nabla_Z = 2 s (Z - Y), \quad S U = 2 s U

with the probabilities :math:`P = \text{softmax}(Z)`, the (one-hot) targets :math:`Y` and the
Hessian :math:`S` in the outputs. Each loss knows the inverse that the samples' span needs,

.. math:: (S^{-1} + \hat K)^{-1} = S - S (\hat K^{-1} + S)^{-1} S, \qquad \hat K = X X^\top / l_2,

written so that a singular S does no harm.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

Inverse = Callable[[Tensor], Tensor]


class OutputLoss(ABC):
    """A loss of T tasks at some outputs.

    Args:
        outputs: Z, shape ``[T, m, k]``.
        targets: Y, shape ``[T, m, k]``; one-hot for classes.
        scale: s.

    Attributes:
        gradient: in Z, shape ``[T, m, k]``.
    """

    gradient: Tensor

    def __init__(self, outputs: Tensor, targets: Tensor, scale: float) -> None:
        self.outputs, self.targets, self.scale = outputs, targets, scale

    def moved(self, outputs: Tensor) -> OutputLoss:
        """The same loss at other outputs."""
        return type(self)(outputs, self.targets, self.scale)

    @abstractmethod
    def value(self, outputs: Tensor) -> Tensor:
        """The losses at any outputs, ``[..., T, m, k] -> [..., T]``."""

    @abstractmethod
    def curve(self, change: Tensor) -> Tensor:
        """S times ``change``, shapes ``[T, m, k]``."""

    @abstractmethod
    def inverse(self, kernel: Tensor, alike: bool = False) -> Inverse:
        r""":math:`(S^{-1} + \hat K)^{-1}` of a kernel ``[T, m, m]``, acting on ``[T, m, k]``.

        With ``alike`` every output is the same, as where all weights are zero; that is cheaper.
        """

    @abstractmethod
    def movement(self, change: Tensor) -> Tensor:
        r"""How far the Hessian moves, ``[T]``, when a sample's outputs move by ``change`` in norm.

        With a movement of :math:`\omega` it stays within factors :math:`e^{\pm \omega}`.
        """

    @abstractmethod
    def noise(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """What rounding of outputs of at most ``largest`` (``[T]``) makes of the gradient in them.

        In units of the rounding: relative to the gradient, and added to it, ``[T]`` each.
        """

    @abstractmethod
    def least_curvature(self) -> Tensor:
        """The smallest eigenvalue of S, but for a constant added to all outputs, ``[T]``."""


class CrossEntropy(OutputLoss):
    """``torch.nn.functional.cross_entropy`` of each task; P is `probabilities`."""

    @cached_property
    def probabilities(self) -> Tensor:
        return self.outputs.softmax(-1)

    @cached_property
    def gradient(self) -> Tensor:  # type: ignore[override]
        return (self.probabilities - self.targets).mul_(self.scale)

    def value(self, outputs: Tensor) -> Tensor:
        chosen = (outputs * self.targets).sum(-1)
        return (outputs.logsumexp(-1) - chosen).sum(-1).mul_(self.scale)

    def curve(self, change: Tensor) -> Tensor:
        weighted = self.probabilities * change
        total = weighted.sum(-1, keepdim=True)
        return weighted.addcmul_(self.probabilities, total, value=-1.0).mul_(self.scale)

    def inverse(self, kernel: Tensor, alike: bool = False) -> Inverse:
        r"""By one Cholesky factor for each class and one for all.

        With :math:`D_c` the diagonal matrix of the samples' :math:`s \, p_c`,
        :math:`E_c = D_c^{1/2} (I + D_c^{1/2} \hat K D_c^{1/2})^{-1} D_c^{1/2}` and R the sum over
        classes, the inverse is :math:`E - E R^\top (R E R^\top)^{-1} R E`: k systems of m unknowns
        instead of one of k m, and all of them well conditioned.

        References:
            Rasmussen, Williams (2006), Gaussian Processes for ML, eq. 3.47, Algorithm 3.3.
        """
        p = self.probabilities[..., :1] if alike else self.probabilities
        root = (self.scale * p).sqrt_().mT.unsqueeze(3)  # [T, k, m, 1]; one k where alike
        eye = torch.eye(kernel.shape[1], dtype=kernel.dtype, device=kernel.device)
        outer = root * root.mT
        factor, _ = torch.linalg.cholesky_ex(torch.addcmul(eye, outer, kernel.unsqueeze(1)))
        try:
            each = torch.cholesky_inverse(factor).mul_(outer)  # E, [T, k, m, m]
        except torch.linalg.LinAlgError as error:
            raise FloatingPointError(
                "linear head: expected features that float64 can tell apart at this l2, got a "
                "singular system; scale the features down, or raise l2"
            ) from error
        # E is at most s; a singular total (classes without probability) is no harm that way.
        total = each.sum(1)
        if alike:
            total.mul_(self.outputs.shape[2])
        total.add_(eye, alpha=4.0 * torch.finfo(eye.dtype).eps * self.scale)
        total_factor, _ = torch.linalg.cholesky_ex(total)

        def inverse(right: Tensor) -> Tensor:
            by_class = (each * right.mT.unsqueeze(2)).sum(3)  # [T, k, m]
            common = torch.cholesky_solve(by_class.sum(1).unsqueeze(2), total_factor)
            return by_class.sub_((each * common.mT.unsqueeze(1)).sum(3)).mT

        return inverse

    def movement(self, change: Tensor) -> Tensor:
        return math.sqrt(2.0) * change  # the most that two outputs of a sample part

    def noise(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        return self.movement(largest), torch.ones_like(largest)

    def least_curvature(self) -> Tensor:
        return self.scale * self.probabilities.amin((1, 2))


class SquaredError(OutputLoss):
    """``torch.nn.functional.mse_loss`` of each task: its Hessian is the same everywhere."""

    @cached_property
    def gradient(self) -> Tensor:  # type: ignore[override]
        return (self.outputs - self.targets).mul_(2.0 * self.scale)

    def value(self, outputs: Tensor) -> Tensor:
        return (outputs - self.targets).square().sum((-2, -1)).mul_(self.scale)

    def curve(self, change: Tensor) -> Tensor:
        return change * (2.0 * self.scale)

    def inverse(self, kernel: Tensor, alike: bool = False) -> Inverse:
        matrix = kernel.clone()
        matrix.diagonal(dim1=1, dim2=2).add_(0.5 / self.scale)
        factor, _ = torch.linalg.cholesky_ex(matrix)
        return lambda right: torch.cholesky_solve(right, factor)

    def movement(self, change: Tensor) -> Tensor:
        # Relative to the errors, in which the gradient is linear.
        tiny = torch.finfo(change.dtype).tiny
        return change / (self.outputs - self.targets).norm(dim=-1).amax(-1).clamp_min(tiny)

    def noise(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(largest), 1.0 + 2.0 * largest

    def least_curvature(self) -> Tensor:
        return torch.full_like(self.outputs[:, 0, 0], 2.0 * self.scale)
