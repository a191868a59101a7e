"""T tasks behind a small backbone, learnt together or one at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_implicit import ImplicitCGHead
from l2l_implicit.batched import AdaptedHeads, BatchedImplicitHead

TASKS, SUPPORT, QUERY, RAW, WIDTH, CLASSES = 3, 8, 6, 5, 7, 3
EXACT = {"cg_tol": 1e-13, "cg_steps": 200}
LOSS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "squared_error": F.mse_loss,
}


class Batch:
    """T tasks behind a backbone; tasks differ in scale, so that they need different work."""

    def __init__(self, loss: str = "cross_entropy", bias: bool = True) -> None:
        scales = torch.linspace(0.3, 3.0, TASKS).view(TASKS, 1, 1)
        self.images = scales * torch.randn(TASKS, SUPPORT + QUERY, RAW)
        labels = torch.stack([torch.randperm(SUPPORT + QUERY) % CLASSES for _ in range(TASKS)])
        numbers = torch.randn(TASKS, SUPPORT + QUERY, CLASSES)
        self.targets = labels if loss == "cross_entropy" else numbers
        self.backbone = torch.randn(RAW, WIDTH).requires_grad_()
        self.l2 = torch.tensor(0.2).requires_grad_()
        self.head, self.name, self.loss = nn.Linear(WIDTH, CLASSES, bias), loss, LOSS[loss]

    def leaves(self) -> list[Tensor]:
        return [self.backbone, self.l2, *self.head.parameters()]

    def features(self) -> Tensor:
        return torch.tanh(self.images @ self.backbone)

    def batched(self, **settings: Any) -> tuple[list[Tensor], AdaptedHeads]:
        """Hypergradients of the mean query loss, then the adapted heads."""
        return self.run(self.make_head(**settings))

    def make_head(self, **settings: Any) -> BatchedImplicitHead:
        return BatchedImplicitHead(self.head, 0.4, l2=self.l2, loss=self.name, **settings)

    def run(self, head: BatchedImplicitHead) -> tuple[list[Tensor], AdaptedHeads]:
        features = self.features()
        adapted = head(features[:, :SUPPORT], self.targets[:, :SUPPORT])
        logits = adapted(features[:, SUPPORT:])
        loss = self.loss(logits.flatten(0, 1), self.targets[:, SUPPORT:].flatten(0, 1))
        return self._gradients(loss), adapted

    def looped(
        self, steps: int, reduction: str = "mean", **settings: Any
    ) -> tuple[list[Tensor], list[ImplicitCGHead]]:
        """The same, one task at a time."""
        parent = ImplicitCGHead(self.head, 0.4, l2=self.l2, **settings)
        losses, learners = [], []
        for features, y in zip(self.features(), self.targets, strict=True):
            learner = parent.clone()

            def support(learner=learner, features=features, y=y) -> Tensor:
                return self.loss(learner(features[:SUPPORT]), y[:SUPPORT], reduction=reduction)

            learner.adapt(support, steps=steps)
            losses.append(self.loss(learner(features[SUPPORT:]), y[SUPPORT:]))
            learners.append(learner)
        return self._gradients(torch.stack(losses).mean()), learners

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        for leaf in self.leaves():
            leaf.grad = None
        loss.backward()
        assert all(leaf.grad is not None for leaf in self.leaves())
        return [leaf.grad.clone() for leaf in self.leaves()]


def weights(learners: list[ImplicitCGHead]) -> Tensor:
    return torch.stack([learner.module.weight for learner in learners])
