"""Per-task batch normalisation: T tasks in one pass, each with its own batch statistics.

Invariant. In memory the images are ordered example by example, the task running fastest. A
contiguous activation ``[n * T, C, ...]`` is then, without a copy, ``[n, T * C, ...]``: torch's own
batch norm with a channel for each (task, channel) normalises every task by itself.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from learn2learn.vision.models.resnet12 import DropBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from l2l_implicit import checks, module_state
from l2l_implicit.chunked import Chunked


def per_task_batch_norm(backbone: nn.Module, tasks: int) -> Callable[[Tensor], Tensor]:
    """``backbone`` for the images of several tasks, as if it were called once for each task.

    Features, gradients, running statistics, ``num_batches_tracked`` and learn2learn's drop-block
    schedule end as one pass for each task, in order, leaves them; random masks (dropout, drop
    block) are drawn anew, each task's as in a pass of its own. The backbone itself, its class, its
    hooks and its ``state_dict()`` stay as they are; it is changed only while it runs.

    Contiguous activations cost no copy; ``channels_last`` is kept, for two copies a batch norm.

    Args:
        backbone: maps images ``[N, ...]`` to features ``[N, ...]``; of its modules only batch norm
            and drop block may let one image depend on another.
        tasks: the number T of tasks.

    Returns:
        A function of images ``[T * n, ...]``, task after task, to features in the same order.

    Raises:
        ValueError: a module lets tasks depend on each other in a way that is not known here; the
            images do not divide by T; the backbone folds something into the batch dimension.

    References:
        Yang, Ma, Yu (2025): batch statistics are those of the task (transductive).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.per_task_norm import per_task_batch_norm
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
        >>> images = torch.randn(4 * 10, 3, 6, 6)  # 4 tasks of 10 images
        >>> per_task_batch_norm(backbone, tasks=4)(images).view(4, 10, -1).shape
        torch.Size([4, 10, 128])
    """
    checks.count("tasks", tasks)
    return functools.partial(_run, backbone, tasks)


def _run(backbone: nn.Module, tasks: int, images: Tensor) -> Tensor:
    rows = len(images)
    if not rows or rows % tasks:
        multiple = f"images: expected a multiple of tasks = {tasks}"
        raise ValueError(f"{multiple}, got {rows}; every task needs equally many")
    forwards: dict[nn.Module, Callable[..., Tensor]] = {}  # of those that are to keep tasks apart
    done: set[nn.Module] = set()
    for name, module in backbone.named_modules():
        if (why := _coupling(module)) is not None:
            raise ValueError(
                f"{name or 'backbone'}: expected modules that treat images one by one, and torch's "
                f"BatchNorm1d, 2d, 3d, got {type(module).__name__}, {why}; run one task at a time"
            )
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            forwards[module] = functools.partial(_normalize, module, done, tasks, rows, name)
        if type(module) is DropBlock and module.training:
            forwards[module] = functools.partial(_drop_blocks, module, tasks)
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        features = backbone(_swap(images, tasks))
    finally:
        for module, own in before.items():
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own
    checks.rows(features, rows)
    for module in backbone.modules():
        # A plain number, as learn2learn's residual blocks keep, has counted one forward pass.
        if type(getattr(module, "num_batches_tracked", None)) is int:
            module.num_batches_tracked += tasks - 1  # type: ignore[operator, assignment]
    return _swap(features, rows // tasks)


def _swap(rows: Tensor, outer: int) -> Tensor:
    """Rows of ``outer`` groups, reordered so that the group runs fastest."""
    swapped = rows.unflatten(0, (outer, -1)).transpose(0, 1)
    return swapped.flatten(0, 1).contiguous(memory_format=_layout(rows))


def _layout(x: Tensor) -> torch.memory_format:
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and not x.is_contiguous() and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _normalize(
    norm: _BatchNorm, done: set[nn.Module], tasks: int, rows: int, name: str, x: Tensor
) -> Tensor:
    """``norm(x)`` of each task; x is ``[n * T, C, ...]``, the task running fastest."""
    if len(x) != rows:
        raise ValueError(
            f"{name or 'backbone'}: expected the batch of {rows} images, got {len(x)} rows; "
            "run a backbone that changes the batch dimension one task at a time"
        )
    if norm.running_mean is not None and norm in done:  # its statistics have T tasks behind them
        raise ValueError(
            f"{name or 'backbone'}: expected a batch norm that is called once in a pass, got one "
            "that is called again; run one task at a time"
        )
    frame = sys._getframe()
    while frame.f_code is not _run.__code__ and frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise ValueError(
                f"{name or 'backbone'}: expected a batch norm outside of activation checkpointing, "
                "got one that backward() is to run again; run one task at a time"
            )
    done.add(norm)
    norm._check_input_dim(x)
    weight, bias = (None if p is None else p.repeat(tasks) for p in (norm.weight, norm.bias))
    running = [s for s in (norm.running_mean, norm.running_var) if s is not None]
    batch = [s.new_zeros(tasks * len(s)) for s in running]
    mean, var = batch or (None, None)
    grouped = x.reshape(rows // tasks, tasks * x.shape[1], *x.shape[2:])
    # With momentum 1 these statistics are the batch's own, one row for each task.
    out = F.batch_norm(grouped, mean, var, weight, bias, True, 1.0, norm.eps)
    if running:
        _update(norm, running, [statistic.view(tasks, -1) for statistic in batch])
    return out.view(rows, *x.shape[1:]).contiguous(memory_format=_layout(x))


@torch.no_grad()
def _update(norm: _BatchNorm, running: list[Tensor], batch: list[Tensor]) -> None:
    r"""The running statistics after T passes, :math:`r_t = (1 - m_t) r_{t-1} + m_t s_t`.

    With momentum m the weight of :math:`s_t` in the end is :math:`m (1 - m)^{T - t}`; with None,
    a cumulative average, every pass counts alike.
    """
    tasks, like, momentum, count = len(batch[0]), batch[0], norm.momentum, norm.num_batches_tracked
    assert count is not None
    if momentum is None:
        share = (1.0 / (count + tasks).double()).to(like.dtype)
        keep, weights = count * share, share.expand(tasks)
    else:
        powers = torch.arange(tasks - 1, -1, -1, device=like.device, dtype=like.dtype)
        keep = like.new_full((), (1.0 - momentum) ** tasks)
        weights = momentum * (1.0 - momentum) ** powers
    for statistic, each in zip(running, batch, strict=True):
        statistic.mul_(keep.to(statistic.dtype)).add_((weights.unsqueeze(1) * each).sum(0))
    count += tasks


def _drop_blocks(module: Any, tasks: int, x: Tensor, gamma: float) -> Tensor:
    """``module(x, gamma)`` of each task; x is ``[n * T, C, h, w]``, the task running fastest.

    learn2learn's own scales by the share that is kept of the whole batch, and lists the dropped
    places, for which a GPU has to be waited for; a running maximum marks the same blocks.
    """
    size, (rows, channels, height, width) = module.block_size, x.shape
    shape = (rows, channels, height - size + 1, width - size + 1)
    centers = torch.empty(shape, dtype=torch.float32, device=x.device).bernoulli_(gamma)
    kept = _keep_mask(centers, size)
    share = kept.view(-1, tasks, *kept.shape[1:]).mean((0, 2, 3, 4))
    scale = (1.0 / share).repeat(rows // tasks).view(rows, 1, 1, 1)
    return x * (kept * scale).to(x.dtype)


def _keep_mask(centers: Tensor, size: int) -> Tensor:
    """0 on the blocks of ``size`` by ``size`` that begin at the ones of ``centers``, else 1."""
    return 1.0 - F.max_pool2d(F.pad(centers, (size - 1,) * 4), size, stride=1)


_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _coupling(module: nn.Module) -> str | None:
    """Why ``module`` would mix the tasks of one pass, or leave another state than T passes, if so.

    Known are torch's own; a module of the user's own that mixes images is not noticed.
    """
    name = getattr(module, "original_name", type(module).__name__).lower().replace("_", "")
    if type(module) not in _PLAIN and isinstance(module, _BatchNorm):
        return "whose forward is not known here"
    if type(module) not in _PLAIN and "batchnorm" in name:
        return "which is called a batch norm"
    if isinstance(module, Chunked):
        return "whose second pass comes later"
    if not module.training:
        return None
    if "dropblock" in name and type(module) is not DropBlock:
        return "whose scale may be that of the whole batch"
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        return "whose running statistics are averaged over the batch"
    if module_state.moves_with_each_pass(module):
        return "whose spectral norm advances at every pass"
    return None
