"""What is measured: algorithms of `experiments.ingredients.algorithm_table`, in their variants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.ingredients.algorithm import make_algorithms
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.ingredients.model import ModelSettings, build_backbone
from experiments.training.algorithms import Algorithm
from experiments.training.episodes import Episode

PUBLISHED = {"features": "as_published", "batch_norm": "separately"}
# Gradient steps, of which all K are taken; the default, Newton, ends where the problem is solved.
GRADIENT = {"step": "gradient"}


class Method(NamedTuple):
    """A name of the algorithm table, and what is changed there."""

    name: str
    changes: Mapping[str, Any]


YANG: dict[str, Method] = {
    "rm_metal/cached": Method("rm_metal", GRADIENT),
    "rm_metal/as_published": Method("rm_metal", {**GRADIENT, **PUBLISHED}),
    "maml/as_published": Method("maml", {}),
    "anil/as_published": Method("anil", PUBLISHED),
    "anil/cached": Method("anil", {}),
    "itd_bio/as_published": Method("itd_bio", PUBLISHED),
    "itd_bio/cached": Method("itd_bio", {}),
}
RAJESWARAN: dict[str, Method] = {
    "imaml/gradient": Method("imaml_gd", GRADIENT),
    "maml/as_published": Method("maml", {}),
    "fomaml/as_published": Method("fomaml", {}),
}


class Shape(NamedTuple):
    """A task of random images, and the filters of the four-layer network that sees them."""

    ways: int
    shots: int
    queries: int
    channels: int
    pixels: int
    hidden: int

    @property
    def title(self) -> str:
        return (
            f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class, "
            f"CNN4-{self.hidden}, {self.pixels} x {self.pixels}"
        )


def episode(shape: Shape, device: torch.device) -> Episode:
    """Random images: memory and time do not depend on what they show."""
    number = shape.ways * (shape.shots + shape.queries)
    size = (number, shape.channels, shape.pixels, shape.pixels)
    labels = torch.arange(shape.ways, device=device)
    inputs = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
    sets = (shape.shots, shape.queries)
    return Episode(inputs, *(labels.repeat_interleave(n) for n in sets))


def build(method: Method, shape: Shape, device: torch.device) -> Algorithm:
    """The algorithm in training, with one inner step."""
    own = AlgorithmSettings.of({"name": method.name, **method.changes, "steps": 1})
    changes = {} if own.together is None else {"together": False}  # one task in memory at a time
    settings = own.model_copy(update=changes)
    # Second derivatives of batch norm are slow in channels_last.
    backbone, width = _backbone(shape, channels_last=settings.scope == "head")
    sizes = (width, shape.ways, shape.ways)
    made = make_algorithms(settings, backbone.to(device), *sizes, cross_entropy, device)
    return made.training


def supervised(shape: Shape, device: torch.device) -> nn.Module:
    """The floor's network: backbone and head."""
    backbone, width = _backbone(shape, channels_last=True)
    return nn.Sequential(backbone, nn.Linear(width, shape.ways)).to(device)


def _backbone(shape: Shape, channels_last: bool) -> tuple[nn.Module, int]:
    settings = {"name": "cnn4", "hidden": shape.hidden, "channels_last": channels_last}
    images = (shape.channels, shape.pixels, shape.pixels)
    return build_backbone(images, ModelSettings.of(settings, "model"))
