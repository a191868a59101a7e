"""T tasks of a linear head behind a backbone, adapted together and by a clone for each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracles import relative_error
from torch import Tensor, nn

from l2l_implicit import Diagnostics, ImplicitCGHead

TASKS, SUPPORT, QUERY, RAW, WIDTH, CLASSES = 3, 8, 6, 5, 7, 3
LOSS = {"cross-entropy": F.cross_entropy, "squared error": F.mse_loss}
Learnt = tuple[Tensor, list[Tensor], list[Diagnostics]]  # phi, hypergradients, what is said


class Batch:
    """T tasks behind a backbone; tasks differ in scale, so that they need different work.

    What a test changes in it, both ways of learning see.
    """

    def __init__(self, loss: str = "cross-entropy", bias: bool = True, tasks: int = TASKS) -> None:
        scales = torch.linspace(0.3, 3.0, tasks).view(tasks, 1, 1)
        self.images = scales * torch.randn(tasks, SUPPORT + QUERY, RAW)
        labels = torch.stack([torch.randperm(SUPPORT + QUERY) % CLASSES for _ in range(tasks)])
        numbers = torch.randn(tasks, SUPPORT + QUERY, CLASSES)
        self.targets = labels if loss == "cross-entropy" else numbers
        self.backbone = torch.randn(RAW, WIDTH).requires_grad_()
        self.l2 = torch.tensor(0.2).requires_grad_()
        self.feature_scales = torch.ones(tasks, 1, 1)
        self.query_weights = torch.ones(tasks)
        self.anchor: Callable[[Tensor], list[Tensor]] | None = None  # of a task's own features
        self.head, self.loss = nn.Linear(WIDTH, CLASSES, bias), LOSS[loss]

    def leaves(self) -> list[Tensor]:
        return [self.backbone, self.l2, *self.head.parameters()]

    def features(self) -> Tensor:
        return self.feature_scales * torch.tanh(self.images @ self.backbone)

    def learner(
        self, cls: type[ImplicitCGHead] = ImplicitCGHead, reduction: str = "mean", **settings: Any
    ) -> ImplicitCGHead:
        kind = nn.MSELoss if self.loss is F.mse_loss else nn.CrossEntropyLoss
        settings = {"l2": self.l2, "loss": kind(reduction=reduction), **settings}
        return cls(self.head, 0.4, **settings)

    def query_loss(self, outputs: Tensor) -> Tensor:
        """Of all tasks, from outputs ``[T, q, k]``."""
        targets = self.targets[:, SUPPORT:]
        each = [self.loss(z, y) for z, y in zip(outputs, targets, strict=True)]
        return (torch.stack(each) * self.query_weights).sum()

    def together(self, learner: ImplicitCGHead, steps: int) -> Learnt:
        """Phi ``[T, n]``, hypergradients, and each task's diagnostics."""
        features = self.features()
        support, anchor = features[:, :SUPPORT], None
        if self.anchor is not None:
            pieces = zip(*map(self.anchor, support), strict=True)
            anchor = [torch.stack(piece) for piece in pieces]
        adapted = learner.adapt_together(support, self.targets[:, :SUPPORT], steps, anchor)
        gradients = self._gradients(self.query_loss(adapted(features[:, SUPPORT:])))
        pieces = [adapted.weight, *([] if adapted.bias is None else [adapted.bias])]
        phi = torch.cat([piece.detach().flatten(1) for piece in pieces], 1)
        return phi, gradients, list(adapted.diagnostics)

    def alone(self, parent: ImplicitCGHead, steps: int) -> Learnt:
        """The same by a clone for each task."""
        outputs, learners = [], []
        reduction = "mean" if parent.loss is None else parent.loss.reduction
        for features, y in zip(self.features(), self.targets, strict=True):
            anchor = None if self.anchor is None else self.anchor(features[:SUPPORT])
            learner = parent.clone(anchor=anchor)

            def support(n=learner, x=features[:SUPPORT], y=y[:SUPPORT]) -> Tensor:  # type: ignore[no-untyped-def]
                return self.loss(n(x), y, reduction=reduction)

            learner.adapt(support, steps=steps)
            outputs.append(learner(features[SUPPORT:]))
            learners.append(learner)
        gradients = self._gradients(self.query_loss(torch.stack(outputs)))
        phi = [torch.cat([p.detach().reshape(-1) for p in n.module.parameters()]) for n in learners]
        return torch.stack(phi), gradients, [learner.diagnostics for learner in learners]

    def _gradients(self, loss: Tensor) -> list[Tensor]:
        leaves = self.leaves()
        return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def assert_same(ours: Learnt, theirs: Learnt, tol: float = 1e-10) -> None:
    """Phi of each task, every hypergradient, and what the diagnostics say of each task."""
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert close(mine, other, tol)
    assert all(close(mine, other, tol) for mine, other in zip(ours[1], theirs[1], strict=True))
    for mine, other in zip(ours[2], theirs[2], strict=True):
        names = ("cg_steps", "cg_reason", "is_bound", "hypergradients", "inner_steps")
        for name in (*names, "unsolved", "unsolved_inner", "unsolved_linear"):
            assert getattr(mine, name) == getattr(other, name), name
        for name in ("inner_gradient_norm", "cg_residual", "hypergradient_error"):
            a, b = getattr(mine, name), getattr(other, name)
            assert a == b or abs(a - b) <= 1e-6 * abs(b) + 1e-10, (name, a, b)


def close(mine: Tensor, other: Tensor, tol: float) -> bool:
    return torch.equal(mine, other) or relative_error([mine], [other]) < tol


def assert_alike(
    batch: Batch, steps: int, tol: float = 1e-10, **settings: Any
) -> list[Diagnostics]:
    """Together as alone; what is said of each task."""
    expected = batch.alone(batch.learner(**settings), steps)
    found = batch.together(batch.learner(**settings), steps)
    assert_same(found, expected, tol)
    return found[2]
