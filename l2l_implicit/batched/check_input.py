"""One clear line for each way in which a batch of tasks can be malformed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.batched.linear_solve import asking_is_free
from l2l_implicit.batched.losses import LOSSES
from l2l_implicit.learner import ImplicitCGHead


def check_support(features: Tensor, targets: Tensor, head: nn.Linear, loss: str) -> None:
    """Support sets of T tasks for ``head``; class numbers are looked at on a CPU only."""
    d, k = head.in_features, head.out_features
    if features.dim() != 3 or features.shape[2] != d or not features.numel():
        raise ValueError(
            f"features: expected shape [T, m, {d}], got {list(features.shape)}; "
            "view the backbone's output as (tasks, images, features)"
        )
    if not features.is_floating_point():
        raise TypeError(f"features: expected floats, got {features.dtype}; convert them")
    if features.device != head.weight.device or targets.device != features.device:
        raise ValueError(
            f"expected one device, got features on {features.device}, targets on "
            f"{targets.device}, the head on {head.weight.device}; move them"
        )
    if loss == "cross_entropy":
        _check_classes(features, targets, k)
        return
    examples = list(features.shape[:2])
    if list(targets.shape) not in ([*examples, k], *([examples] if k == 1 else [])):
        raise ValueError(
            f"targets: expected shape {[*examples, k]}, got {list(targets.shape)}; reshape them"
        )


def _check_classes(features: Tensor, targets: Tensor, classes: int) -> None:
    if targets.shape != features.shape[:2]:
        raise ValueError(
            f"targets: expected shape {list(features.shape[:2])}, got {list(targets.shape)}; "
            "stack the tasks' labels"
        )
    if targets.dtype != torch.long:
        raise TypeError(f"targets: expected torch.long, got {targets.dtype}; call .long()")
    if asking_is_free(targets):  # elsewhere the scatter checks itself
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise ValueError(
                f"targets: expected classes 0 to {classes - 1}, got {low} to {high}; relabel them"
            )


def check_queries(query: Tensor, weight: Tensor) -> None:
    """Query features of the T tasks that the heads were adapted to."""
    if query.dim() != 3 or query.shape[0] != weight.shape[0] or query.shape[2] != weight.shape[2]:
        expected = f"[{weight.shape[0]}, q, {weight.shape[2]}]"
        raise ValueError(
            f"query: expected shape {expected}, got {list(query.shape)}; "
            "pass the same tasks in the same order"
        )


def check_settings(
    lr: object, l2: object, anchor: object, step: object, loss: object, reduction: object
) -> None:
    """The inner problem and its solver."""
    checks.positive("lr", lr)
    checks.coefficient(l2)
    checks.choice("anchor", anchor, ("zero", "init"))
    checks.choice("step", step, ("newton", "gradient"))
    checks.choice("loss", loss, LOSSES)
    checks.choice("reduction", reduction, ("mean", "sum"))


def check_solver(linear_solver: str, l2: object, cg_steps: int, ask_every: int) -> None:
    """How the linear systems are solved."""
    checks.choice("linear_solver", linear_solver, ("auto", "direct", "cg"))
    checks.count("cg_steps (N)", cg_steps)
    if ask_every != 0:
        checks.count("ask_every", ask_every)
    if linear_solver == "direct" and not isinstance(l2, Tensor) and l2 == 0:
        raise ValueError("l2: expected above 0 for a direct solve, got 0; use 'cg'")


def check_head(head: ImplicitCGHead) -> None:
    """A head whose every setting has a batched counterpart."""
    if type(head) is not ImplicitCGHead:
        raise TypeError(
            f"head: expected ImplicitCGHead itself, got {type(head).__name__}; "
            "adapt one task at a time"
        )
    gradient = head.step == "gradient"
    alone = {
        "warm_start": head._memory is not None,
        "first_order": head.first_order,
        "a step of your own": not isinstance(head.step, str),
        "lr='auto' with step='gradient'": gradient and isinstance(head.lr, str),
        "stop_tol with step='gradient'": gradient and head.stop_tol is not None,
        "solver='neumann'": head.solver == "neumann",
        "damping": head.damping != 0,
    }
    for name, used in alone.items():
        if used:
            raise ValueError(
                f"head: expected settings that serve several tasks, got {name}; "
                "adapt one task at a time"
            )
