r"""The losses that a linear head may have in closed form, as functions of its outputs alone.

With outputs :math:`Z` (``[m, k]``) and one scale :math:`s` (1 over what a mean divides by, or 1):

.. math:: \text{cross-entropy:} \quad \nabla_Z = s (P - T), \quad
          \nabla^2_Z \, U = s (P \odot U - P \odot (P \odot U) 1 1^\top)
.. math:: \text{squared error:} \quad \nabla_Z = 2 s (Z - T), \quad \nabla^2_Z \, U = 2 s U

with the probabilities :math:`P = \text{softmax}(Z)` and the (one-hot) targets :math:`T`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor


class OutputLoss(Protocol):
    """A convex loss at some outputs Z.

    Attributes:
        outputs: what it was computed from, as the graph recorded it: Z, or log-probabilities.
        targets: class indices ``[m]``, or values ``[m, k]``.
        scale: s.
    """

    outputs: Tensor
    targets: Tensor
    scale: float

    @property
    def gradient(self) -> Tensor:
        """In Z, shape ``[m, k]``."""

    def curve(self, change: Tensor) -> Tensor:
        """The Hessian's product with ``change``, shapes ``[m, k]``; may overwrite it."""

    def blocks(self) -> Tensor:
        """The Hessian's blocks, one for each sample, as ``[k, k, m]``."""

    def value(self) -> float:
        """The loss."""

    def moved(self, outputs: Tensor) -> OutputLoss:
        """The same loss at other outputs Z."""


class CrossEntropy:
    """Of log-probabilities ``[m, k]`` and class indices ``[m]``, times ``scale``."""

    def __init__(self, log_probabilities: Tensor, targets: Tensor, scale: float) -> None:
        self.outputs, self.targets, self.scale = log_probabilities, targets, scale
        self._p = log_probabilities.exp()

    @cached_property
    def _one_hot(self) -> Tensor:
        column = self.targets.long().unsqueeze(1)
        return torch.zeros_like(self.outputs).scatter_(1, column, 1.0)

    @cached_property
    def gradient(self) -> Tensor:
        return torch.sub(self._p, self._one_hot).mul_(self.scale)

    def curve(self, change: Tensor) -> Tensor:
        change.mul_(self._p).mul_(self.scale)
        return change.addcmul_(self._p, change.sum(1, keepdim=True), value=-1.0)

    def blocks(self) -> Tensor:
        p = self._p.t()
        blocks = (p * -self.scale).unsqueeze(1) * p
        blocks.diagonal().add_(self._p, alpha=self.scale)
        return blocks

    def value(self) -> float:
        return -self.scale * float(torch.dot(self.outputs.view(-1), self._one_hot.view(-1)))

    def moved(self, outputs: Tensor) -> CrossEntropy:
        there = CrossEntropy(torch.log_softmax(outputs, 1), self.targets, self.scale)
        there.__dict__["_one_hot"] = self._one_hot
        return there


class SquaredError:
    """Of outputs and targets ``[m, k]``, times ``scale``."""

    def __init__(self, outputs: Tensor, targets: Tensor, scale: float) -> None:
        self.outputs, self.targets, self.scale = outputs, targets, scale

    @cached_property
    def gradient(self) -> Tensor:
        return (self.outputs - self.targets).mul_(2.0 * self.scale)

    def curve(self, change: Tensor) -> Tensor:
        return change.mul_(2.0 * self.scale)

    def blocks(self) -> Tensor:
        m, k = self.outputs.shape
        unit = torch.eye(k, dtype=self.outputs.dtype, device=self.outputs.device)
        return (2.0 * self.scale * unit).unsqueeze(2).expand(k, k, m)

    def value(self) -> float:
        return self.scale * float((self.outputs - self.targets).square().sum())

    def moved(self, outputs: Tensor) -> SquaredError:
        return SquaredError(outputs, self.targets, self.scale)
