"""learn2learn's drop block for several tasks: the mask's scale is each task's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from learn2learn.vision.models.resnet12 import DropBlock as DropBlock
from torch import Tensor


def drop_blocks(module: Any, tasks: int, x: Tensor, gamma: float) -> Tensor:
    """``module(x, gamma)`` of each task; x is ``[n * T, C, h, w]``, the task running fastest.

    learn2learn scales what is kept by its share of the whole batch, which would couple the tasks.
    It also lists the dropped places, for which a GPU has to be waited for; a running maximum marks
    the same blocks.
    """
    size = module.block_size
    rows, channels, height, width = x.shape
    shape = (rows, channels, height - size + 1, width - size + 1)
    centers = torch.empty(shape, dtype=torch.float32, device=x.device).bernoulli_(gamma)
    kept = keep_mask(centers, size)
    share = kept.view(-1, tasks, *kept.shape[1:]).mean((0, 2, 3, 4))
    scale = (1.0 / share).repeat(rows // tasks).view(rows, 1, 1, 1)
    return x * (kept * scale).to(x.dtype)


def keep_mask(centers: Tensor, size: int) -> Tensor:
    """0 on the blocks of ``size`` by ``size`` that begin at the ones of ``centers``, else 1."""
    padded = F.pad(centers, (size - 1,) * 4)
    return 1.0 - F.max_pool2d(padded, size, stride=1)
