"""Which few-shot tasks: data set, ways, shots, queries."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.tracking import TrackedIngredient, UserError
from l2l_implicit.tasks import get_tasksets, split_support_query

tasks = TrackedIngredient("tasks")
TYPES = {"split": str | None, "level": str | None, "size": int | None}


@tasks.config
def defaults() -> None:
    name = "glyphs"  # data set
    ways = 5  # classes a task
    shots = 5  # support images a class
    queries = 5  # query images a class
    root = "~/data"  # folder of the data sets that are not embedded
    split = None  # glyphs: random or script
    level = None  # glyphs: clean, easy, medium or hard
    size = None  # caltech101: pixels


class Episode(NamedTuple):
    """One task: support images first, then query images, and their labels.

    Attributes:
        images: ``[ways * (shots + queries), channels, height, width]``.
        support_labels: ``[ways * shots]``.
        query_labels: ``[ways * queries]``.
    """

    images: Tensor
    support_labels: Tensor
    query_labels: Tensor


class TaskStream:
    """Tasks in an order that depends on the seed alone, whatever else draws random numbers.

    Args:
        taskset: learn2learn's; its transforms draw from Python's ``random``.
        shots: support images a class.
        seed: of this stream's own state of ``random``.
    """

    def __init__(self, taskset: Any, shots: int, seed: int) -> None:
        self.taskset, self._shots = taskset, shots
        self._state = random.Random(seed).getstate()

    def sample(self) -> Episode:
        """The next task."""
        with self.own_random():
            images, labels = self.taskset.sample()
        support, query = split_support_query(images, labels, self._shots)
        return Episode(torch.cat([support[0], query[0]]), support[1], query[1])

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Python's ``random`` in this stream's state; what is drawn inside moves it on."""
        others = random.getstate()
        random.setstate(self._state)
        try:
            yield
        finally:
            self._state = random.getstate()
            random.setstate(others)


class Tasks(NamedTuple):
    """The three task sets; a stream is started with a seed."""

    sets: Any
    ways: int
    shots: int
    queries: int

    def stream(self, mode: str, seed: int) -> TaskStream:
        """Tasks of ``mode`` (train, validation or test)."""
        return TaskStream(getattr(self.sets, mode), self.shots, seed)

    def image_shape(self) -> torch.Size:
        """Channels, height, width."""
        return self.sets.train.dataset[0][0].shape


@tasks.capture
def make_tasks(
    name: str,
    ways: int,
    shots: int,
    queries: int,
    root: str,
    split: str | None,
    level: str | None,
    size: int | None,
) -> Tasks:
    """The configured task sets.

    Raises:
        UserError: what the data set cannot give, in one line.
    """
    for key, value, least in (("ways", ways, 2), ("shots", shots, 1), ("queries", queries, 1)):
        if value < least:
            raise UserError(f"tasks.{key}: expected at least {least}, got {value}; try 5")
    given = {"split": split, "level": level, "size": size}
    options = {key: value for key, value in given.items() if value is not None}
    samples = shots + queries
    try:
        sets = get_tasksets(
            name,
            train_ways=ways,
            train_samples=samples,
            test_ways=ways,
            test_samples=samples,
            root=root,
            **options,
        )
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"tasks.name={name}: {error}") from error
    return Tasks(sets, ways, shots, queries)
