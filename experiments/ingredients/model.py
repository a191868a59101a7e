"""The feature extractor theta: learn2learn's convolutional networks, or a small dense one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import learn2learn as l2l
import torch
from pydantic import Field
from torch import Tensor, nn

from experiments.tracking import TrackedIngredient, wrong
from experiments.tracking.config import Settings
from experiments.tracking.errors import reason
from l2l_implicit.distributed import own_device

HIDDEN = {"cnn4": 32, "omniglot_cnn": 64, "mlp": 40}


class ModelSettings(Settings):
    """The settings of this ingredient."""

    # None: cnn4 for images, mlp for vectors; omniglot_cnn: strides instead of pools (Finn et al.)
    name: Literal["cnn4", "omniglot_cnn", "resnet12", "wrn28", "mlp"] | None = None
    # filters a layer (cnn4; None: 32; omniglot_cnn: 64) or units a layer (mlp: 40)
    hidden: Annotated[int, Field(ge=1, le=65_536)] | None = None
    # cnn4: pool after its last layer too; without it there are four times as many features
    last_pool: bool = True
    # of the backbone's products: bfloat16 (torch's autocast) takes half the time where the
    # processor has it; parameters, features and heads stay float32
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool = True  # memory layout of images; about 1.6 times faster on a CPU


model = TrackedIngredient("model", settings=ModelSettings)


def build_backbone(input_shape: Sequence[int], settings: ModelSettings) -> tuple[nn.Module, int]:
    """The network, and how many features it gives for one input; UserError: it cannot be built.

    Args:
        input_shape: (channels, height, width) of an image, or (n,) of a vector.
    """
    image, shape = len(input_shape) == 3, tuple(input_shape)
    name = settings.name or ("cnn4" if image else "mlp")
    _check(name, settings, shape)
    try:
        backbone = _build(name, settings.hidden or HIDDEN.get(name, 0), shape[0])
        if not settings.last_pool:
            backbone[-1].max_pool = nn.Identity()
        if settings.precision == "bfloat16":
            backbone = LowPrecision(backbone)
        if settings.channels_last and image:
            backbone = backbone.to(memory_format=torch.channels_last)
        with torch.no_grad():
            width = backbone.eval()(torch.zeros(1, *shape)).shape[1]
    except (RuntimeError, MemoryError, ZeroDivisionError) as error:  # resnet12 divides by its size
        size = "" if settings.hidden is None else f" with hidden={settings.hidden}"
        expected = f"a network for inputs of shape {shape} that fits into memory"
        small = f"try model.name={'cnn4' if image else 'mlp'}, smaller layers or larger images"
        raise wrong("model", expected, f"{name}{size} ({reason(error)})", small) from error
    if not width:
        expected = f"a network that leaves features of images of shape {shape}"
        raise wrong("model.name", expected, f"{name!r}, which leaves none", "use larger images")
    return backbone.train(), width


class LowPrecision(nn.Module):
    """A network under bfloat16 autocast, whose outputs are widened again."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
            return self.network(inputs).to(inputs.dtype)  # type: ignore[no-any-return]


def _build(name: str, hidden: int, channels: int) -> nn.Module:
    if name == "cnn4":
        return l2l.vision.models.CNN4Backbone(hidden_size=hidden, channels=channels)
    if name == "omniglot_cnn":
        base = l2l.vision.models.cnn4.ConvBase(hidden, channels, max_pool=False)
        return nn.Sequential(base, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    if name == "resnet12":
        return l2l.vision.models.ResNet12Backbone(channels=channels)
    if name == "wrn28":
        return l2l.vision.models.WRN28Backbone()
    layers = nn.Linear(channels, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())


def _check(name: str, settings: ModelSettings, shape: Sequence[int]) -> None:
    if settings.hidden is not None and name not in HIDDEN:
        raise wrong("model.hidden", f"none for {name}", settings.hidden)
    if not settings.last_pool and name != "cnn4":
        raise wrong("model.last_pool", f"True for {name}", False)
    if (name == "mlp") == (len(shape) == 3):
        image = "cnn4, omniglot_cnn, resnet12 or wrn28 for images"
        right = image if name == "mlp" else "mlp for vectors"
        raise wrong("model.name", right, repr(name))
    if name == "wrn28" and shape[0] != 3:
        raise wrong("model.name", f"cnn4 or resnet12 for {shape[0]}-channel images",
                    "'wrn28', which takes 3 channels")


def device_of(name: str) -> torch.device:
    """A device by its name, or the one to use by default (``auto``), on which torch can train."""
    try:
        if name == "auto":
            return own_device()
        device = torch.device(name)
        one = torch.ones(1, device=device, requires_grad=True)
        (2 * one).sum().backward()
        one.grad.item()  # type: ignore[union-attr]  # what has no numbers raises here
    except Exception as error:  # each backend has its own
        got = f"{name!r} ({reason(error)})"
        raise wrong("device", "auto, cpu or a GPU that is there", got, "try cpu") from error
    return device


def use_threads(number: int) -> None:
    """So many threads of torch; 0 leaves torch's own choice."""
    if number:
        torch.set_num_threads(number)


@contextmanager
def within_limits() -> Iterator[None]:
    """UserError where something does not fit into memory or a float; also before a function."""
    try:
        yield
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        if isinstance(error, ZeroDivisionError):  # a bug
            raise
        numbers = isinstance(error, (ArithmeticError, torch.linalg.LinAlgError))
        if numbers or "without overflow" in str(error):  # torch's word of what no float32 holds
            todo = "choose less extreme settings"
            raise wrong("numbers", "finite ones", reason(error), todo) from error
        told = re.search("alloc|out of memory|invalid storage size", str(error))
        if not told and not isinstance(error, MemoryError):
            raise
        less = "ask for less at once: fewer tasks, classes, images or features"
        raise wrong("memory", "a run that fits into it", reason(error), less) from error
