"""Per-task batch normalisation: T tasks in one pass, each with its own batch statistics.

Invariant. In memory the images are ordered example by example, the task running fastest. A
contiguous activation ``[n * T, C, ...]`` is then, without a copy, ``[n, T * C, ...]``: torch's own
batch norm with a channel for each (task, channel) normalises every task by itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.parametrizations as parametrizations
from learn2learn.vision.models.resnet12 import DropBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from l2l_implicit import checks
from l2l_implicit.chunked import Chunked

Forward = Callable[..., Tensor]


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
        A function of images ``[T * n, ...]``, task after task (those of task t are rows
        ``t * n`` to ``(t + 1) * n``), to features in the same order.

    Raises:
        ValueError: a module lets tasks depend on each other in a way that is not known here; the
            images do not divide by T; or the backbone folds something into the batch dimension.

    References:
        Yang, Ma, Yu (2025): batch statistics are those of the task (transductive).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.per_task_norm import per_task_batch_norm
        >>> backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())
        >>> images = torch.randn(4 * 10, 3, 6, 6)  # 4 tasks of 10 images
        >>> features = per_task_batch_norm(backbone, tasks=4)(images)
        >>> features.view(4, 10, -1).shape
        torch.Size([4, 10, 128])
        >>> backbone[1].num_batches_tracked
        tensor(4)
    """
    checks.count("tasks", tasks)
    return functools.partial(_run, backbone, tasks)


def _run(backbone: nn.Module, tasks: int, images: Tensor) -> Tensor:
    if not len(images) or len(images) % tasks:
        raise ValueError(
            f"images: expected a multiple of tasks = {tasks}, got {len(images)}; "
            "every task needs equally many"
        )
    _find_coupling(backbone)
    n = len(images) // tasks
    with _tasks_apart(backbone, tasks, len(images)):
        features = backbone(_swap(images, tasks, n))
    if len(features) != len(images):
        raise ValueError(
            f"backbone: expected one row of features for each of {len(images)} images, got "
            f"{len(features)}; do not reduce over the batch"
        )
    return _swap(features, n, tasks)


def _swap(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows of ``outer`` groups of ``inner``, reordered so that the group runs fastest."""
    layout = _layout(rows)
    swapped = rows.unflatten(0, (outer, inner)).transpose(0, 1)
    return swapped.flatten(0, 1).contiguous(memory_format=layout)


def _layout(x: Tensor) -> torch.memory_format:
    if x.is_contiguous():
        return torch.contiguous_format
    for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


@contextlib.contextmanager
def _tasks_apart(backbone: nn.Module, tasks: int, rows: int) -> Iterator[None]:
    """While this lasts, batch-coupled modules treat each task by itself."""
    counters = [m for m in backbone.modules() if _counts_passes(m)]
    with contextlib.ExitStack() as stack:
        for name, module in backbone.named_modules():
            forward = _forward_of(name, module, tasks, rows)
            if forward is not None:
                stack.enter_context(_replaced(module, forward))
        yield
    for module in counters:  # one pass was counted
        module.num_batches_tracked += tasks - 1  # type: ignore[operator, assignment]


def _forward_of(name: str, module: nn.Module, tasks: int, rows: int) -> Forward | None:
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        return functools.partial(_normalize, module, tasks, rows, name)
    if type(module) is DropBlock and module.training:
        return functools.partial(_drop_blocks, module, tasks)
    return None


def _counts_passes(module: nn.Module) -> bool:
    """Whether a plain number, such as learn2learn's residual blocks keep, counts forward passes."""
    return type(getattr(module, "num_batches_tracked", None)) is int


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Forward) -> Iterator[None]:
    own: dict[str, Any] = module.__dict__
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        del own["forward"]
        if before is not None:
            own["forward"] = before


def _normalize(norm: _BatchNorm, tasks: int, rows: int, name: str, x: Tensor) -> Tensor:
    """``norm(x)`` of each task; x is ``[n * T, C, ...]``, the task running fastest."""
    if len(x) != rows:
        raise ValueError(
            f"{name or 'backbone'}: expected the batch of {rows} images, got {len(x)} rows; "
            "run a backbone that changes the batch dimension one task at a time"
        )
    norm._check_input_dim(x)
    channels, size = x.shape[1], tasks * x.shape[1]
    weight = None if norm.weight is None else norm.weight.repeat(tasks)
    bias = None if norm.bias is None else norm.bias.repeat(tasks)
    mean = var = None
    if norm.running_mean is not None and norm.running_var is not None:
        mean, var = norm.running_mean.new_zeros(size), norm.running_var.new_zeros(size)
    grouped = x.reshape(rows // tasks, size, *x.shape[2:])
    # With momentum 1 the running statistics are the batch's own, one row for each task.
    out = F.batch_norm(grouped, mean, var, weight, bias, True, 1.0, norm.eps)
    if mean is not None and var is not None:
        _update(norm, mean.view(tasks, channels), var.view(tasks, channels))
    return out.view(rows, *x.shape[1:]).contiguous(memory_format=_layout(x))


@torch.no_grad()
def _update(norm: _BatchNorm, mean: Tensor, var: Tensor) -> None:
    r"""The running statistics after T passes, :math:`r_t = (1 - m_t) r_{t-1} + m_t s_t`.

    With momentum m the weight of :math:`s_t` in the end is :math:`m (1 - m)^{T - t}`; with None,
    a cumulative average, every pass counts alike.
    """
    tasks, count = len(mean), norm.num_batches_tracked
    assert norm.running_mean is not None and norm.running_var is not None and count is not None
    if norm.momentum is None:
        share = (1.0 / (count + tasks)).to(mean.dtype)
        keep, weights = count * share, share.expand(tasks)
    else:
        powers = torch.arange(tasks - 1, -1, -1, device=mean.device, dtype=mean.dtype)
        keep = mean.new_full((), (1.0 - norm.momentum) ** tasks)
        weights = norm.momentum * (1.0 - norm.momentum) ** powers
    for running, each in ((norm.running_mean, mean), (norm.running_var, var)):
        running.mul_(keep.to(running.dtype)).add_((weights.unsqueeze(1) * each).sum(0))
    count += tasks


def _drop_blocks(module: Any, tasks: int, x: Tensor, gamma: float) -> Tensor:
    """``module(x, gamma)`` of each task; x is ``[n * T, C, h, w]``, the task running fastest.

    learn2learn scales what is kept by its share of the whole batch, which would couple the tasks.
    It also lists the dropped places, for which a GPU has to be waited for; a running maximum marks
    the same blocks.
    """
    size = module.block_size
    rows, channels, height, width = x.shape
    shape = (rows, channels, height - size + 1, width - size + 1)
    centers = torch.empty(shape, dtype=torch.float32, device=x.device).bernoulli_(gamma)
    kept = _keep_mask(centers, size)
    share = kept.view(-1, tasks, *kept.shape[1:]).mean((0, 2, 3, 4))
    scale = (1.0 / share).repeat(rows // tasks).view(rows, 1, 1, 1)
    return x * (kept * scale).to(x.dtype)


def _keep_mask(centers: Tensor, size: int) -> Tensor:
    """0 on the blocks of ``size`` by ``size`` that begin at the ones of ``centers``, else 1."""
    padded = F.pad(centers, (size - 1,) * 4)
    return 1.0 - F.max_pool2d(padded, size, stride=1)


# What couples the images of a batch in a way that is not known here.

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _find_coupling(backbone: nn.Module) -> None:
    """Refuse modules that would mix the tasks of one pass, or leave another state than T passes.

    Known are torch's own; a module of the user's own that mixes images is not noticed.

    Raises:
        ValueError: there is one.
    """
    for name, module in backbone.named_modules():
        why = _coupling(module)
        if why is not None:
            raise ValueError(
                f"{name or 'backbone'}: expected modules that treat images one by one, and torch's "
                f"BatchNorm1d, 2d, 3d, got {type(module).__name__}, {why}; run one task at a time"
            )


def _coupling(module: nn.Module) -> str | None:
    """Why ``module`` couples the tasks, or None."""
    if isinstance(module, _BatchNorm) and type(module) not in _PLAIN:
        return "whose forward is not known here"
    if "batchnorm" in _bare_name(module) and type(module) not in _PLAIN:
        return "which is called a batch norm"
    if "dropblock" in _bare_name(module) and type(module) is not DropBlock and module.training:
        return "whose scale may be that of the whole batch"
    if isinstance(module, Chunked):
        return "whose second pass comes later"
    if isinstance(module, _InstanceNorm) and module.track_running_stats and module.training:
        return "whose running statistics are averaged over the batch"
    spectral = getattr(parametrizations, "_SpectralNorm", ())
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, spectral) or any(isinstance(hook, SpectralNorm) for hook in hooks):
        return "whose spectral norm advances at every pass" if module.training else None
    return None


def _bare_name(module: nn.Module) -> str:
    return type(module).__name__.lower().replace("_", "")
