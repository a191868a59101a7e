"""What learn2learn's example scripts have in common."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import l2l_implicit  # noqa: F401  (first: it makes learn2learn importable)

import learn2learn as l2l  # isort: skip


def seeded(seed: int = 42) -> torch.device:
    """As the scripts begin; the device that they compute on."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.device("cpu")


def tasksets(name: str, ways: int, shots: int, **settings: Any) -> Any:
    """Those of a benchmark: as many samples to adapt to as to evaluate on."""
    numbers = {"train_ways": ways, "train_samples": 2 * shots,
               "test_ways": ways, "test_samples": 2 * shots}  # fmt: skip
    return l2l.vision.benchmarks.get_tasksets(name, **numbers, **settings)


def halves(data: Tensor, labels: Tensor, shots: int, ways: int) -> tuple[Tensor, ...]:
    """Adaptation data and labels, then evaluation data and labels: every other sample."""
    adaptation = torch.zeros(len(data), dtype=torch.bool)
    adaptation[torch.arange(shots * ways) * 2] = True
    return data[adaptation], labels[adaptation], data[~adaptation], labels[~adaptation]


def fast_adapt(
    batch: Any, learner: Any, loss: Any, steps: int, shots: int, ways: int,
    features: Callable[[Tensor], Tensor] = lambda data: data,
) -> Tensor:  # fmt: skip
    """The evaluation loss after the steps of a loop over losses."""
    data, labels = batch
    x, y, x_query, y_query = halves(features(data), labels, shots, ways)
    for _step in range(steps):
        learner.adapt(loss(learner(x), y))
    return loss(learner(x_query), y_query)


def outer_steps(
    iterations: int, tasks: int, sets: Iterable[Any], evaluate: Callable[[Any], Tensor],
    parameters: list[Tensor], optimizer: torch.optim.Optimizer,
) -> list[float]:  # fmt: skip
    """The losses of training tasks; each is followed by a validation task without a backward."""
    errors, (train, valid) = [], sets
    for _iteration in range(iterations):
        optimizer.zero_grad()
        for _task in range(tasks):
            error = evaluate(train.sample())
            error.backward()
            errors.append(error.item())
            evaluate(valid.sample())
        for p in parameters:
            p.grad.data.mul_(1.0 / tasks)
        optimizer.step()
    return errors
