"""One few-shot task, the backbone that sees it and the head that adapts to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import learn2learn as l2l
import torch
from learn2learn.vision.models.cnn4 import ConvBlock
from torch import Tensor, nn

STEP_SIZE = 0.1


class Shape(NamedTuple):
    """What a task looks like: ``ways * (shots + queries)`` square images, a network for them.

    ``network`` is a key of `NETWORKS`, which see three channels; ``hidden`` its number of filters,
    where it has a choice.
    """

    network: str = "cnn4"
    hidden: int = 64
    pixels: int = 32
    ways: int = 5
    shots: int = 5
    queries: int = 5
    channels: int = 3

    @property
    def title(self) -> str:
        network = self.network.replace("cnn4", f"CNN4-{self.hidden}").replace("resnet", "ResNet")
        return (
            f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class, "
            f"{network}, {self.pixels} x {self.pixels}"
        )


class Setting(NamedTuple):
    """Where everything runs."""

    device: str = "cpu"
    channels_last: bool = True
    seed: int = 0


class Problem(NamedTuple):
    """A task with its backbone; every method takes a copy of ``head``, equal at the start."""

    backbone: nn.Module
    head: nn.Linear
    images: Tensor
    labels: Tensor
    split: int
    device: str

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        return self.images[: self.split], self.labels[: self.split]

    @property
    def query(self) -> tuple[Tensor, Tensor]:
        return self.images[self.split :], self.labels[self.split :]

    def new_head(self) -> nn.Linear:
        return copy.deepcopy(self.head)

    def whole(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.new_head())


def _group_norm(hidden: int) -> nn.Module:
    """CNN4 whose normalisation does not look at other images."""
    network = l2l.vision.models.CNN4Backbone(hidden_size=hidden)
    for block in network:
        block.normalize = nn.GroupNorm(max(1, hidden // 8), hidden)
    return network


def _wide(hidden: int) -> nn.Module:
    """CNN4 that pools once: ``hidden * (pixels / 2) ** 2`` features, 16,384 for 64 and 32."""
    blocks = [ConvBlock(3, hidden, (3, 3), max_pool=True)]
    for _ in range(3):
        blocks.append(ConvBlock(hidden, hidden, (3, 3), max_pool=False, max_pool_factor=0.5))
    return nn.Sequential(*blocks, nn.Flatten())


def _resnet12_wide(_: int) -> nn.Module:
    """ResNet12 without its last pooling: 16,000 features at 84 pixels."""
    network = l2l.vision.models.ResNet12Backbone(avg_pool=False)
    network.flatten = nn.Flatten()  # learn2learn's refuses channels_last
    return network


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "cnn4": lambda hidden: l2l.vision.models.CNN4Backbone(hidden_size=hidden),
    "cnn4, GroupNorm": _group_norm,
    "cnn4, pooled once": _wide,
    "resnet12": lambda _: l2l.vision.models.ResNet12Backbone(),
    "resnet12, 16,000 features": _resnet12_wide,
}


def build(shape: Shape, setting: Setting) -> Problem:
    """Random images and a network in training mode, the same for a seed."""
    torch.manual_seed(setting.seed)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    number = shape.ways * (shape.shots + shape.queries)
    images = torch.randn(number, shape.channels, shape.pixels, shape.pixels, device=setting.device)
    images = images.contiguous(memory_format=layout)
    backbone = NETWORKS[shape.network](shape.hidden).to(setting.device, memory_format=layout)
    with torch.no_grad():
        width = backbone.eval()(images[:2]).shape[1]
    classes = torch.arange(shape.ways, device=setting.device)
    labels = [classes.repeat_interleave(shape.shots), classes.repeat_interleave(shape.queries)]
    head = nn.Linear(width, shape.ways, device=setting.device)
    split = shape.ways * shape.shots
    return Problem(backbone.train(), head, images, torch.cat(labels), split, setting.device)
