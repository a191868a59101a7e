"""T linear heads adapted at once: `ImplicitCGHead.adapt_together`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.diagnostics import Diagnostics
from l2l_implicit.implicit_diff import attach, split
from l2l_implicit.inner_problem.linearization import SquaredDistance
from l2l_implicit.inner_problem.losses import CrossEntropy, SquaredError
from l2l_implicit.inner_problem.recognition import HeadLoss

if TYPE_CHECKING:
    from l2l_implicit.learner import ImplicitCGHead


class AdaptedHeads:
    """T adapted linear heads, with their implicit gradient.

    Attributes:
        weight: ``[T, k, d]``.
        bias: ``[T, k]``, or None.
        diagnostics: of each task.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, diagnostics: Sequence[Diagnostics]
    ) -> None:
        self.weight, self.bias, self.diagnostics = weight, bias, diagnostics

    def __call__(self, query: Tensor) -> Tensor:
        """Each task's outputs for its own features: ``[T, q, d] -> [T, q, k]``.

        In the heads' precision, under autocast too.
        """
        checks.queries(query, self.weight)
        with torch.autocast(query.device.type, enabled=False):
            logits = torch.bmm(query.to(self.weight.dtype), self.weight.transpose(1, 2))
            return logits if self.bias is None else logits + self.bias.unsqueeze(1)


def adapt_heads(
    learner: ImplicitCGHead, features: Tensor, targets: Tensor, steps: int,
    anchor: Tensor | Sequence[Tensor] | None = None,
) -> AdaptedHeads:  # fmt: skip
    """`ImplicitCGHead.adapt_together`."""
    checks.can_be_together(learner)
    checks.head_loss(learner.loss)
    learner.diagnostics.say()
    checks.count("steps (K)", steps)
    head: nn.Linear = learner.module
    loss, keep = learner.loss, torch.is_grad_enabled()
    squared = isinstance(loss, nn.MSELoss)
    if loss is None and isinstance(targets, Tensor):
        squared = targets.is_floating_point()
    checks.support(features, targets, head, squared)
    phi = checks.inner_parameters(head, allow_nograd=False)
    tasks, m = features.shape[:2]
    own = [] if anchor is None else checks.anchor(anchor, phi, tasks)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        quadratic = learner._quadratic(phi, torch.float64)
        if own:
            quadratic = SquaredDistance(learner.l2, own, torch.float64, tasks)
        x, source = features.detach(), features if keep and features.requires_grad else None
        x = x.clone() if x.dtype == torch.float64 else x  # others are copied on the way there
        kind = SquaredError if squared else CrossEntropy
        count = m * head.out_features if squared else m
        scale = 1.0 if loss and loss.reduction == "sum" else 1.0 / max(1, count)
        targets = targets.to(torch.float64, copy=True) if squared else targets
        known = HeadLoss(x, source, None, head.bias is not None, targets, kind, scale)
        at = known.heads(phi, quadratic)
        if own and quadratic.center is not None:
            at = at.moved(quadratic.center)
        there = learner._on_heads(at, steps)
        diagnostics = [Diagnostics(parent=learner.diagnostics) for _ in range(tasks)]
        shapes = [torch.Size((tasks, *p.shape)) for p in phi]
        point = there.point.to(head.weight.dtype)
    if keep:
        saved = learner._saved(there, point, diagnostics)
        zero = phi if own or learner.anchor == "zero" else []
        pieces = attach(saved, point, shapes, constants=zero)
    else:
        pieces = split(point, shapes)
    learner._note(there, diagnostics)
    if not keep:
        learner.diagnostics.say()
    return AdaptedHeads(pieces[0], pieces[1] if len(pieces) > 1 else None, diagnostics)
