"""How hard are the tasks for raw pixels? Nearest centroid, without any learning."""

import math
from typing import Any

import torch
from torch import Tensor

from l2l_implicit.tasks.episode import split_support_query


def nearest_centroid_accuracy(
    taskset: Any, ways: int, shots: int, queries: int, num_tasks: int = 100
) -> tuple[float, float]:
    """Mean accuracy over tasks of assigning each query to the nearest class mean, on raw inputs.

    A lower bound for every trained method, and the measure of a data set's difficulty.

    Args:
        taskset: anything whose `sample()` returns `(data, labels)` of one episode.
        ways: classes of an episode.
        shots: support samples a class.
        queries: query samples a class; episodes hold `ways * (shots + queries)` samples.
        num_tasks: episodes to draw, at least 2.

    Returns:
        Mean accuracy and the half width of its 95 % interval, both in [0, 1].

    Raises:
        ValueError: an episode has other numbers of classes or samples; fewer than 2 tasks.

    Example:
        >>> from l2l_implicit.tasks import get_tasksets, nearest_centroid_accuracy
        >>> tasks = get_tasksets("glyphs", test_samples=10, level="clean").test
        >>> mean, half_width = nearest_centroid_accuracy(tasks, ways=5, shots=5, queries=5)
        >>> 0.8 < mean < 1.0
        True
    """
    if num_tasks < 2:
        raise ValueError(f"expected num_tasks of at least 2, got {num_tasks}: an interval needs 2")
    tasks = (taskset.sample() for _ in range(num_tasks))
    accuracies = torch.tensor(
        [_accuracy(data, labels, ways, shots, queries) for data, labels in tasks],
        dtype=torch.float64,
    )
    return accuracies.mean().item(), 1.96 * accuracies.std().item() / math.sqrt(num_tasks)


def _accuracy(data: Tensor, labels: Tensor, ways: int, shots: int, queries: int) -> float:
    classes = labels.unique(sorted=True)
    if len(classes) != ways or len(labels) != ways * (shots + queries):
        raise ValueError(
            f"expected episodes of ways={ways} classes with shots + queries = {shots + queries} "
            f"samples each, got {len(labels)} samples of {len(classes)} classes: pass the numbers "
            "that the task set was made with (train_ways, train_samples, ...)"
        )
    (support, _), (query, targets) = split_support_query(data, labels, shots)
    centroids = support.flatten(1).reshape(ways, shots, -1).mean(1)
    nearest = torch.cdist(query.flatten(1), centroids).argmin(1)
    return (classes[nearest.to(labels.device)] == targets).double().mean().item()
