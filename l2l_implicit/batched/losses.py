r"""Support losses of a linear head, for T tasks at once.

A loss is a function of the logits :math:`Z` (``[T, m, k]``). Its Hessian in them is one block
:math:`S_i` of size k by k for each example; a root :math:`S_i = L_i L_i^\top` in closed form lets
linear systems be solved in the dimension of the examples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor


class Curvature(ABC):
    """A loss's Hessian in the logits at one point, and its root L."""

    @abstractmethod
    def apply(self, u: Tensor) -> Tensor:
        """S u, shapes ``[T, m, k]``."""

    @abstractmethod
    def root(self, z: Tensor) -> Tensor:
        """L z, of shape ``[T, m, k]``, for z as `root_transposed` returns it."""

    @abstractmethod
    def root_transposed(self, u: Tensor) -> Tensor:
        """L' u for u of shape ``[T, m, k]``, as columns ``[T, size, c]``."""

    @abstractmethod
    def weighted_gram(self, gram: Tensor) -> Tensor:
        """L' (G x I) L, shape ``[T, size, size]``, from the Gram matrix G, ``[T, m, m]``."""


class SupportLoss(ABC):
    """The loss over each task's support set.

    Attributes:
        targets: ``[T, m, k]``; one-hot for classes.
    """

    targets: Tensor

    @abstractmethod
    def value(self, logits: Tensor) -> Tensor:
        """Values for logits ``[..., T, m, k]``, shape ``[..., T]``."""

    @abstractmethod
    def gradient(self, logits: Tensor) -> Tensor:
        """Gradient in the logits, shape ``[T, m, k]``."""

    @abstractmethod
    def curvature(self, logits: Tensor) -> Curvature:
        """Hessian in the logits."""

    @abstractmethod
    def system_size(self) -> int:
        """Rows of `Curvature.weighted_gram`."""


class CrossEntropy(SupportLoss):
    """``torch.nn.functional.cross_entropy`` of each task.

    Args:
        targets: one-hot, ``[T, m, k]``.
        mean: whether to average over the examples, or to sum.
    """

    def __init__(self, targets: Tensor, mean: bool) -> None:
        self.targets, self.scale = targets, 1.0 / targets.shape[1] if mean else 1.0

    def value(self, logits: Tensor) -> Tensor:
        per_example = logits.logsumexp(-1) - (logits * self.targets).sum(-1)
        return self.scale * per_example.sum(-1)

    def gradient(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1).sub_(self.targets).mul_(self.scale)

    def curvature(self, logits: Tensor) -> Curvature:
        return SoftmaxCurvature(logits.softmax(-1), self.scale)

    def system_size(self) -> int:
        return self.targets.shape[1] * self.targets.shape[2]


class SoftmaxCurvature(Curvature):
    r""":math:`S_i = s (\mathrm{diag}(p_i) - p_i p_i^\top)`; with :math:`q = \sqrt p`,
    :math:`L_i = \sqrt s (\mathrm{diag}(q_i) - p_i q_i^\top)`, since the entries of p add up to 1.
    """

    def __init__(self, probabilities: Tensor, scale: float) -> None:
        self._p, self._q, self._scale = probabilities, probabilities.sqrt(), scale

    def apply(self, u: Tensor) -> Tensor:
        pu = self._p * u
        return pu.sub_(self._p * pu.sum(-1, keepdim=True)).mul_(self._scale)

    def root(self, z: Tensor) -> Tensor:
        qz = self._q * z.view_as(self._q)
        return qz.sub_(self._p * qz.sum(-1, keepdim=True)).mul_(math.sqrt(self._scale))

    def root_transposed(self, u: Tensor) -> Tensor:
        centered = u - (self._p * u).sum(-1, keepdim=True)
        return centered.mul_(self._q).mul_(math.sqrt(self._scale)).view(len(u), -1, 1)

    def weighted_gram(self, gram: Tensor) -> Tensor:
        tasks, m, k = self._p.shape
        rows = self._q.diag_embed() - self._q.unsqueeze(3) * self._p.unsqueeze(2)
        rows = rows.view(tasks, m * k, k)
        blocks = torch.bmm(rows, rows.transpose(1, 2)).mul_(self._scale)
        blocks.view(tasks, m, k, m, k).mul_(gram.view(tasks, m, 1, m, 1))
        return blocks


class SquaredError(SupportLoss):
    """``torch.nn.functional.mse_loss`` of each task.

    Args:
        targets: ``[T, m, k]``.
        mean: whether to average over examples and outputs, or to sum.
    """

    def __init__(self, targets: Tensor, mean: bool) -> None:
        self.targets = targets
        self.scale = 2.0 / targets[0].numel() if mean else 2.0

    def value(self, logits: Tensor) -> Tensor:
        return 0.5 * self.scale * (logits - self.targets).square().sum((-2, -1))

    def gradient(self, logits: Tensor) -> Tensor:
        return (logits - self.targets).mul_(self.scale)

    def curvature(self, logits: Tensor) -> Curvature:
        return ConstantCurvature(self.scale)

    def system_size(self) -> int:
        return self.targets.shape[1]


class ConstantCurvature(Curvature):
    """S = s I: the outputs part, and one system of size m serves them all."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def apply(self, u: Tensor) -> Tensor:
        return self._scale * u

    def root(self, z: Tensor) -> Tensor:
        return math.sqrt(self._scale) * z

    def root_transposed(self, u: Tensor) -> Tensor:
        return math.sqrt(self._scale) * u

    def weighted_gram(self, gram: Tensor) -> Tensor:
        return self._scale * gram


LOSSES: dict[str, Callable[[Tensor, bool], SupportLoss]] = {
    "cross_entropy": CrossEntropy,
    "squared_error": SquaredError,
}
