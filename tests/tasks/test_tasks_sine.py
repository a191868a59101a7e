"""The sinusoid regression of Finn et al. 2017."""

import math
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import small_benchmarks
import torch

from l2l_implicit.tasks import get_tasksets

made = partial(small_benchmarks.made, "sine", Path(), shots=10, queries=7)


def test_episodes_are_points_of_uniform_sines() -> None:
    """Exact ones; means and deviations of 1,000 tasks, to four standard errors."""
    stream, tasks = made(queries=7).stream("train", 0), 1000
    inputs, amplitudes, phases = [], [], []
    for _ in range(tasks):
        x, support, query = stream.sample()
        assert x.shape == (17, 1) and support.shape == (10, 1) and query.shape == (7, 1)
        assert x.dtype == support.dtype == torch.float32 and x.abs().max() <= 5
        y = torch.cat([support, query]).double()
        basis = torch.cat([x.double().sin(), x.double().cos()], 1)
        solution = torch.linalg.lstsq(basis, y).solution
        assert torch.allclose(basis @ solution, y, atol=1e-5)
        a, b = solution[:, 0].tolist()
        amplitudes.append(math.hypot(a, b))
        phases.append(math.atan2(-b, a))
        inputs.append(x[0, 0].item())
    for values, low, high in ((amplitudes, 0.1, 5), (phases, 0, math.pi), (inputs, -5, 5)):
        assert low - 1e-5 <= min(values) and max(values) <= high + 1e-5
        width = (high - low) / math.sqrt(12)
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=4 * width / math.sqrt(tasks))
        assert np.std(values) == pytest.approx(width, rel=0.06)


def test_sizes_and_outputs_know_no_ways() -> None:
    benchmark = made(ways=5, test_shots=3)
    assert benchmark.kind == "regression"
    assert benchmark.sizes("train") == (1, 10, 7) and benchmark.sizes("test") == (1, 3, 7)
    assert benchmark.input_shape() == (1,)
    assert benchmark.stream("test", 0).sample().support_targets.shape == (3, 1)
    assert benchmark.describe()["kind"] == "regression"


def test_the_seed_alone_decides_and_a_finite_task_set_repeats_its_tasks() -> None:
    state = random.getstate()
    first = made().stream("validation", 2).sample()
    torch.manual_seed(9)
    second, other = (made().stream("validation", seed).sample() for seed in (2, 3))
    assert random.getstate() == state
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.inputs, other.inputs)
    train = get_tasksets("sine", num_tasks=2, train_samples=4).train
    assert len(train) == 2 and torch.equal(train[1][1], train[1][1])
    assert not torch.equal(train[0][1], train[1][1])
