r"""The inner objectives of T tasks that share a linear head's shape.

.. math:: g_t(\phi_t) = \text{loss}_t(X_t W_t^\top + c_t) + \tfrac{l_2}{2} \|\phi_t - a\|^2

A vector ``[T, n]`` holds, for each task, the weight (``[k, d]``, row by row) and then the bias.
The formulas are those of `l2l_implicit.inner_problem.linear_head`, each product one batched
matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from l2l_implicit.batched.losses import SupportLoss


class LinearObjective:
    """T inner objectives.

    Args:
        features: X, shape ``[T, m, d]``, detached.
        loss: the support losses.
        l2: a scalar tensor, detached.
        anchor: a, shape ``[n]``, detached; None for zero.
        bias: whether the head has one.
    """

    def __init__(
        self, features: Tensor, loss: SupportLoss, l2: Tensor, anchor: Tensor | None, bias: bool
    ) -> None:
        self.features, self.loss, self.l2, self.anchor = features, loss, l2, anchor
        self.bias, self.classes = bias, loss.targets.shape[2]

    def weight(self, vector: Tensor) -> Tensor:
        """The weights ``[T, k, d]`` in ``vector``, a view."""
        tasks, _, width = self.features.shape
        return vector[:, : self.classes * width].view(tasks, self.classes, width)

    def logits(self, vector: Tensor) -> Tensor:
        """X V' + e, shape ``[T, m, k]``, for a vector ``[T, n]`` of heads (V, e)."""
        transposed = self.weight(vector).transpose(1, 2)
        if not self.bias:
            return torch.bmm(self.features, transposed)
        bias = vector[:, -self.classes :].unsqueeze(1)
        return torch.baddbmm(bias, self.features, transposed)

    def in_phi(self, per_logit: Tensor) -> Tensor:
        """Gradient in phi, ``[T, n]``, of functions with gradient ``[T, m, k]`` in the logits."""
        weight = torch.bmm(per_logit.transpose(1, 2), self.features).flatten(1)
        return torch.cat([weight, per_logit.sum(1)], 1) if self.bias else weight

    def gram(self) -> Tensor:
        """X X', plus 1 where there is a bias, shape ``[T, m, m]``."""
        gram = torch.bmm(self.features, self.features.transpose(1, 2))
        return gram.add_(1.0) if self.bias else gram

    def offset(self, phi: Tensor) -> Tensor:
        """phi - a, shape ``[T, n]``."""
        return phi if self.anchor is None else phi - self.anchor

    def gradient(self, phi: Tensor, logits: Tensor) -> Tensor:
        """Of g in phi, ``[T, n]``, where ``logits`` are those of ``phi``."""
        return self.in_phi(self.loss.gradient(logits)).add_(self.l2 * self.offset(phi))


class BatchedLinearization:
    """`LinearObjective` at one point: the batched `l2l_implicit.Linearization`.

    Args:
        objective: what is linearized.
        phi: the point, ``[T, n]``.
        logits: the support logits there, ``[T, m, k]``.
    """

    def __init__(self, objective: LinearObjective, phi: Tensor, logits: Tensor) -> None:
        self.objective, self.phi, self.logits = objective, phi, logits
        self.curvature = objective.loss.curvature(logits)

    def hvp(self, vector: Tensor) -> Tensor:
        """Hessian-vector products, ``[T, n] -> [T, n]``."""
        change = self.curvature.apply(self.objective.logits(vector))
        return self.objective.in_phi(change).add_(self.objective.l2 * vector)

    def features_vjp(self, vector: Tensor) -> Tensor:
        """Mixed products with the support features, ``[T, n] -> [T, m, d]``."""
        objective = self.objective
        change = self.curvature.apply(objective.logits(vector))
        slope = objective.loss.gradient(self.logits)
        product = torch.bmm(slope, objective.weight(vector))
        return product.baddbmm_(change, objective.weight(self.phi))

    def l2_vjp(self, vector: Tensor) -> Tensor:
        """Mixed product with l2, a scalar summed over the tasks."""
        return (self.objective.offset(self.phi) * vector).sum()

    def anchor_vjp(self, vector: Tensor) -> Tensor:
        """Mixed product with the anchor, ``[n]``, summed over the tasks."""
        return -self.objective.l2 * vector.sum(0)
