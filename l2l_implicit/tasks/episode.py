"""An episode of learn2learn, split into support and query, and how hard it is for raw pixels."""

import math
from typing import Any

import torch
from torch import Tensor

from l2l_implicit import checks

Labelled = tuple[Tensor, Tensor]  # inputs [n, ...], labels [n]


def split_support_query(data: Tensor, labels: Tensor, shots: int) -> tuple[Labelled, Labelled]:
    """The first `shots` samples of every class are the support set, the others the query set.

    Unlike a split by even and odd positions it does not depend on the order in which classes come,
    and classes may have unequal numbers of query samples.

    Args:
        data: inputs [ways * (shots + queries), ...] in any order.
        labels: class of each input, [ways * (shots + queries)], integers.
        shots: support samples a class.

    Returns:
        `(support_data, support_labels), (query_data, query_labels)`, both sorted by class and,
        within a class, in the order of the episode.

    Raises:
        ValueError: labels do not match the data, or a class has not more than `shots` samples.
        TypeError: `shots` is no whole number.

    Example:
        >>> x, y = torch.arange(6.0), torch.tensor([1, 0, 1, 0, 1, 0])
        >>> split_support_query(x, y, shots=1)[0]
        (tensor([1., 0.]), tensor([0, 1]))
    """
    if labels.dim() != 1 or len(labels) != len(data):
        raise ValueError(
            f"expected one label for each of {len(data)} inputs, got labels of shape "
            f"{tuple(labels.shape)}: pass data and labels of the same episode"
        )
    checks.count("shots", shots)
    ordered, order = torch.sort(labels, stable=True)
    classes, counts = torch.unique_consecutive(ordered, return_counts=True)
    if bool((counts <= shots).any()):
        worst = int(counts.argmin())
        raise ValueError(
            f"expected more than shots={shots} samples of every class (the rest are queries), got "
            f"{int(counts[worst])} of class {int(classes[worst])}: sample more images a class "
            "(train_samples, test_samples) or lower shots"
        )
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    is_support = torch.arange(len(labels), device=labels.device) - first < shots
    support, query = order[is_support], order[~is_support]
    return (
        (data[support.to(data.device)], labels[support]),
        (data[query.to(data.device)], labels[query]),
    )


def nearest_centroid_accuracy(
    taskset: Any, ways: int, shots: int, queries: int, num_tasks: int = 100
) -> tuple[float, float]:
    """Mean accuracy over tasks of assigning each query to the nearest class mean, on raw inputs.

    A lower bound for every trained method, and the measure of a data set's difficulty.

    Args:
        taskset: anything whose `sample()` returns `(data, labels)` of one episode.
        ways: classes of an episode.
        shots, queries: support and query samples a class; an episode holds just these.
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
    shares = [_accuracy(data, labels, ways, shots, queries) for data, labels in tasks]
    accuracies = torch.tensor(shares, dtype=torch.float64)
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
