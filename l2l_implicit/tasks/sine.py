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
from torch.utils.data import TensorDataset

from l2l_implicit import checks
from l2l_implicit.tasks.image_table import Device
from l2l_implicit.tasks.tasksets import MODES, Benchmark, refuse_unknown

AMPLITUDES, PHASES, INPUTS = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)


def draw_sine(samples: int, device: Device, description: Any = None) -> list[Any]:
    r"""A task description for `learn2learn.data.Taskset`: points of $y = a \sin(x - \varphi)$.

    Amplitude a in [0.1, 5], phase in [0, pi], x in [-5, 5], all uniform, drawn from Python's
    `random` alone, in this order. A task is (x float32 [samples, 1], y float32 [samples, 1]).
    """
    amplitude, phase = random.uniform(*AMPLITUDES), random.uniform(*PHASES)
    points = [l2l.data.DataDescription(index) for index in range(samples)]
    for point in points:
        x = random.uniform(*INPUTS)
        values = (x, amplitude * math.sin(x - phase))
        point.transforms.append(functools.partial(_tensors, values, device))
    return points


def _tensors(values: tuple[float, ...], device: Device, index: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([value], device=device) for value in values)


def sine_tasksets(
    train_ways: int = 1, train_samples: int = 20, test_ways: int = 1, test_samples: int = 20,
    root: str | None = None, device: Device = None, **kwargs: Any,
) -> Benchmark:  # fmt: skip
    """(datasets, transforms) of the sinusoid regression, as learn2learn's benchmarks return them.

    Args:
        train_ways, test_ways: ignored, a regression has one output.
        train_samples, test_samples: points of a task, shots plus queries.
        root: ignored, nothing is stored.
        device, kwargs: see `get_tasksets`.

    Example:
        >>> import learn2learn, l2l_implicit.tasks
        >>> sets = learn2learn.vision.benchmarks.get_tasksets("sine", train_samples=20)
        >>> [tuple(values.shape) for values in sets.train.sample()]
        [(20, 1), (20, 1)]
    """
    refuse_unknown(kwargs, own=())
    samples = dict(zip(MODES, (train_samples, test_samples, test_samples), strict=True))
    checks.count("train_samples", train_samples)
    checks.count("test_samples", test_samples)
    point = TensorDataset(torch.zeros(1, 1), torch.zeros(1, 1))  # tasks are drawn, not looked up
    datasets = tuple(l2l.data.MetaDataset(point, labels_to_indices={}) for _ in MODES)
    draws = (functools.partial(draw_sine, number, device) for number in samples.values())
    return datasets, tuple(draws)
