"""Sinusoid regression: few points of a sine of unknown amplitude and phase.

Finn, Abbeel, Levine: Model-Agnostic Meta-Learning, ICML 2017, section 5.1.
"""

import functools
import math
import random
from typing import Any

import learn2learn as l2l
import torch
from torch import Tensor
from torch.utils.data import Dataset

from l2l_implicit.tasks.tasksets import MODES, Benchmark, refuse_unknown

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


class NoClasses(Dataset):
    """Says what a sample looks like; the tasks themselves are drawn, not looked up."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(1), torch.zeros(1)


class DrawSine:
    r"""A task description for `learn2learn.data.Taskset`: points of $y = a \sin(x - \varphi)$.

    Amplitude a in [0.1, 5], phase in [0, pi], x in [-5, 5], all uniform, drawn from Python's
    `random` alone, in this order. A task is (x float32 [samples, 1], y float32 [samples, 1]).

    Args:
        samples: points of a task, shots plus queries.
        device: where the points live, None for the CPU.
    """

    def __init__(self, samples: int, device: torch.device | str | None = None) -> None:
        self.samples, self._device = samples, device

    def __call__(self, description: Any = None) -> list[Any]:
        amplitude, phase = random.uniform(*AMPLITUDES), random.uniform(*PHASES)
        points = []
        for index in range(self.samples):
            x = random.uniform(*INPUTS)
            point = l2l.data.DataDescription(index)
            y = amplitude * math.sin(x - phase)
            point.transforms.append(functools.partial(self._point, x, y))
            points.append(point)
        return points

    def _point(self, x: float, y: float, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([x], device=self._device), torch.tensor([y], device=self._device)


def sine_tasksets(
    train_ways: int = 1,
    train_samples: int = 20,
    test_ways: int = 1,
    test_samples: int = 20,
    root: str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> Benchmark:
    """(datasets, transforms) of the sinusoid regression, as learn2learn's benchmarks return them.

    Args:
        train_ways, test_ways: ignored, a regression has one output.
        train_samples, test_samples: points of a task, shots plus queries.
        root: ignored, nothing is stored.
        device: where the points live, None for the CPU.
        kwargs: nothing else; `data_augmentation=None` is accepted as learn2learn's callers pass it.

    Raises:
        ValueError: less than one point.
        TypeError: an unknown option.

    Example:
        >>> import learn2learn, l2l_implicit.tasks
        >>> sets = learn2learn.vision.benchmarks.get_tasksets("sine", train_samples=20)
        >>> [tuple(values.shape) for values in sets.train.sample()]
        [(20, 1), (20, 1)]
    """
    refuse_unknown(kwargs, own=())
    samples = dict(zip(MODES, (train_samples, test_samples, test_samples), strict=True))
    for mode, number in samples.items():
        if number < 1:
            raise ValueError(f"expected at least 1 point in a {mode} task, got {number}: pass 20")
    datasets = tuple(l2l.data.MetaDataset(NoClasses(), labels_to_indices={}) for _ in MODES)
    return datasets, tuple(DrawSine(number, device) for number in samples.values())
