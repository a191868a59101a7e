"""Which few-shot tasks: data set, ways, shots, queries, for training and for testing."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.tracking import TrackedIngredient, UserError
from l2l_implicit import checks
from l2l_implicit.tasks import (
    canonical,
    describe_tasksets,
    get_tasksets,
    kind_of,
    split_support_query,
)

tasks = TrackedIngredient("tasks")
TYPES = {
    "test_ways": int | None,
    "test_shots": int | None,
    "test_queries": int | None,
    "split": str | None,
    "level": str | None,
    "size": int | None,
    "split_seed": int | None,
    "augmentation": str | None,
}


@tasks.config
def defaults() -> None:
    name = "glyphs"  # data set
    ways = 5  # classes a task
    shots = 5  # support images a class
    queries = 5  # query images a class
    test_ways = None  # of validation and test tasks; None: as in training
    test_shots = None
    test_queries = None
    root = "~/data"  # folder of the data sets that are not embedded
    split = None  # glyphs: random or script
    level = None  # glyphs: clean, easy, medium or hard
    size = None  # caltech101, folder: pixels
    split_seed = None  # omniglot, folder: seed of the split into training, validation and test
    augmentation = None  # mini_imagenet, tiered_imagenet: normalize
    skip_unreadable = False  # folder: leave out images that cannot be read, and count them


class Sizes(NamedTuple):
    """Classes a task, support and query samples a class; ``ways`` is 1 for a regression."""

    ways: int
    shots: int
    queries: int


class Episode(NamedTuple):
    """One task: its inputs, support first, then query, and the targets of both.

    Attributes:
        inputs: ``[ways * (shots + queries), ...]``.
        support_targets: ``[ways * shots]`` int64 labels, or ``[shots, 1]`` float values.
        query_targets: ``[ways * queries]`` int64 labels, or ``[queries, 1]`` float values.
    """

    inputs: Tensor
    support_targets: Tensor
    query_targets: Tensor


class TaskStream:
    """Tasks in an order that depends on the seed alone, whatever else draws random numbers.

    Args:
        taskset: learn2learn's; its transforms draw from Python's ``random``.
        shots: support samples a class.
        seed: of this stream's own state of ``random``.
    """

    def __init__(self, taskset: Any, shots: int, seed: int) -> None:
        self.taskset, self._shots = taskset, shots
        self.state = random.Random(seed).getstate()

    def sample(self) -> Episode:
        """The next task."""
        with self.own_random():
            inputs, targets = self.taskset.sample()
        if targets.is_floating_point():  # a regression has no classes to take the shots from
            return Episode(inputs, targets[: self._shots], targets[self._shots :])
        support, query = split_support_query(inputs, targets, self._shots)
        return Episode(torch.cat([support[0], query[0]]), support[1], query[1])

    @contextmanager
    def own_random(self) -> Iterator[None]:
        """Python's ``random`` in this stream's state; what is drawn inside moves it on."""
        others = random.getstate()
        random.setstate(self.state)
        try:
            yield
        finally:
            self.state = random.getstate()
            random.setstate(others)


class Tasks:
    """The three task sets of one data set; a stream of tasks is started with a seed.

    Args:
        sets: task sets train, validation and test.
        name: of the data set.
        train: sizes of training tasks.
        test: sizes of validation and test tasks.
        options: what the data set was made with.

    Attributes:
        kind: ``"classification"`` or ``"regression"``.
    """

    def __init__(
        self, sets: Any, name: str, train: Sizes, test: Sizes, options: Mapping[str, Any]
    ) -> None:
        self.sets, self.name = sets, canonical(name)
        self.kind = kind_of(self.name)
        self._sizes = {"train": train, "validation": test, "test": test}
        self._options = dict(options)

    def stream(self, mode: str, seed: int) -> TaskStream:
        """Tasks of ``mode`` (train, validation or test)."""
        shots = self.sizes(mode).shots  # first: it knows the modes
        return TaskStream(getattr(self.sets, mode), shots, seed)

    def sizes(self, mode: str) -> Sizes:
        """Ways, shots and queries of the tasks of ``mode``."""
        checks.choice("mode", mode, self._sizes)
        ways, shots, queries = self._sizes[mode]
        return Sizes(ways if self.kind == "classification" else 1, shots, queries)

    def outputs(self, mode: str) -> int:
        """How many outputs a model needs: ways of the mode, 1 for a regression."""
        return self.sizes(mode).ways

    def input_shape(self) -> torch.Size:
        """Of one sample: channels, height, width; ``[1]`` for sine."""
        return torch.as_tensor(self.sets.train.dataset[0][0]).shape

    def describe(self) -> dict[str, Any]:
        """What was resolved, fit for JSON: data set, options, sizes, classes and images a split."""
        return {
            "name": self.name,
            "kind": self.kind,
            "options": dict(self._options),
            "sizes": {mode: self.sizes(mode)._asdict() for mode in self._sizes},
            "input_shape": list(self.input_shape()),
            **describe_tasksets(self.sets),
        }


@tasks.capture
def make_tasks(
    name: str,
    ways: int,
    shots: int,
    queries: int,
    test_ways: int | None,
    test_shots: int | None,
    test_queries: int | None,
    root: str,
    split: str | None,
    level: str | None,
    size: int | None,
    split_seed: int | None,
    augmentation: str | None,
    skip_unreadable: bool,
) -> Tasks:
    """The configured task sets.

    Raises:
        UserError: what the data set cannot give, in one line.
    """
    train = _checked("", Sizes(ways, shots, queries))
    asked = (test_ways, test_shots, test_queries)
    same = (usual if own is None else own for own, usual in zip(asked, train, strict=True))
    test = _checked("test_", Sizes(*same))
    given = {
        "split": split,
        "level": level,
        "size": size,
        "split_seed": split_seed,
        "data_augmentation": augmentation,
        "skip_unreadable": skip_unreadable or None,
    }
    options = {key: value for key, value in given.items() if value is not None}
    try:
        sets = get_tasksets(
            name,
            train_ways=train.ways,
            train_samples=train.shots + train.queries,
            test_ways=test.ways,
            test_samples=test.shots + test.queries,
            root=root,
            **options,
        )
        return Tasks(sets, name, train, test, options)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"tasks.name={name}: {error}") from error


def _checked(prefix: str, sizes: Sizes) -> Sizes:
    for (key, value), least in zip(sizes._asdict().items(), (2, 1, 1), strict=True):
        if value < least:
            raise UserError(f"tasks.{prefix}{key}: expected at least {least}, got {value}; try 5")
    return sizes
