"""The feature extractor theta: learn2learn's convolutional networks, or a small dense one."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

from collections.abc import Sequence

import learn2learn as l2l
import torch
from torch import nn

from experiments.tracking import TrackedIngredient, UserError
from l2l_implicit import Chunked, checks

model = TrackedIngredient("model")
TYPES = {"name": str | None, "hidden": int | None, "chunk_size": int | None}
BACKBONES = ("cnn4", "resnet12", "wrn28", "mlp")
HIDDEN = {"cnn4": 32, "mlp": 40}


@model.config
def defaults() -> None:
    name = None  # cnn4, resnet12, wrn28 or mlp; None: cnn4 for images, mlp for vectors
    hidden = None  # filters a layer (cnn4; None: 32) or units a layer (mlp; None: 40)
    channels_last = True  # memory layout of images; about 1.6 times faster on a CPU
    chunk_size = None  # images that pass the backbone at once, each twice; None: all, once


def build_backbone(
    input_shape: Sequence[int],
    name: str | None,
    hidden: int | None,
    channels_last: bool,
    chunk_size: int | None = None,
) -> tuple[nn.Module, int]:
    """The network, and how many features it gives for one input.

    Args:
        input_shape: (channels, height, width) of an image, or (n,) of a vector.
        name, hidden, channels_last, chunk_size: the configuration of this ingredient.

    Raises:
        UserError: no such network, or not for such inputs.
    """
    image = len(input_shape) == 3
    name = name or ("cnn4" if image else "mlp")
    _check(name, hidden, input_shape)
    backbone = _build(name, hidden or HIDDEN.get(name, 0), input_shape[0])
    if channels_last and image:
        backbone = backbone.to(memory_format=torch.channels_last)
    with torch.no_grad():
        width = backbone.eval()(torch.zeros(1, *input_shape)).shape[1]
    backbone.train()
    if chunk_size is None:
        return backbone, width
    try:
        return Chunked(backbone, chunk_size), width
    except (TypeError, ValueError) as error:
        raise UserError(f"model.{error}") from error


def _build(name: str, hidden: int, channels: int) -> nn.Module:
    if name == "cnn4":
        return l2l.vision.models.CNN4Backbone(hidden_size=hidden, channels=channels)
    if name == "resnet12":
        return l2l.vision.models.ResNet12Backbone(channels=channels)
    if name == "wrn28":
        if channels != 3:
            raise UserError(f"model.name: expected cnn4 or resnet12 for {channels}-channel "
                            "images, got 'wrn28', which takes 3 channels")
        return l2l.vision.models.WRN28Backbone()
    return nn.Sequential(
        nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    )


def _check(name: str, hidden: int | None, input_shape: Sequence[int]) -> None:
    try:
        checks.choice("name", name, BACKBONES)
    except ValueError as error:
        raise UserError(f"model.{error}") from error
    if hidden is not None and hidden < 1:
        raise UserError(f"model.hidden: expected at least 1, got {hidden}; try 32")
    if hidden is not None and name not in HIDDEN:
        raise UserError(f"model.hidden: expected none for {name}, got {hidden}; leave it out")
    if (name == "mlp") == (len(input_shape) == 3):
        kind = "images" if len(input_shape) == 3 else "vectors"
        right = "cnn4, resnet12 or wrn28" if kind == "images" else "mlp"
        raise UserError(f"model.name: expected {right} for {kind}, got {name!r}")


make_backbone = model.capture(build_backbone)
