"""The feature extractor theta: learn2learn's convolutional networks."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import learn2learn as l2l
import torch
from torch import nn

from experiments.tracking import TrackedIngredient, UserError
from experiments.tracking.errors import nearest

model = TrackedIngredient("model")


@model.config
def defaults() -> None:
    name = "cnn4"  # cnn4 or resnet12
    hidden = 32  # filters a layer (cnn4)
    channels_last = True  # memory layout; about 1.6 times faster on a CPU


def build_backbone(
    image_shape: torch.Size, name: str, hidden: int, channels_last: bool
) -> tuple[nn.Module, int]:
    """The network, and how many features it gives for an image of ``image_shape`` (c, h, w).

    Raises:
        UserError: no such network.
    """
    if hidden < 1:
        raise UserError(f"model.hidden: expected at least 1 filter, got {hidden}; try 32")
    channels = image_shape[0]
    if name == "cnn4":
        backbone: nn.Module = l2l.vision.models.CNN4Backbone(hidden_size=hidden, channels=channels)
    elif name == "resnet12":
        backbone = l2l.vision.models.ResNet12Backbone(channels=channels)
    else:
        near = nearest(name, ["cnn4", "resnet12"])
        raise UserError(f"model.name: expected cnn4 or resnet12, got {name!r}{near}")
    if channels_last:
        backbone = backbone.to(memory_format=torch.channels_last)
    with torch.no_grad():
        width = backbone.eval()(torch.zeros(1, *image_shape)).shape[1]
    return backbone.train(), width


make_backbone = model.capture(build_backbone)
