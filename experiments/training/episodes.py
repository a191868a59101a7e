"""Few-shot tasks as the training loop sees them: streams of episodes, and their sizes.

A task's own data may be wrong (nan in an image, a label out of range): ``on_bad_task=stop`` ends
the run with an error, ``skip`` takes the next task instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.tracking import UserError
from l2l_implicit import checks
from l2l_implicit.tasks import canonical, describe_tasksets, kind_of, split_support_query

MOST_IN_A_ROW = 100


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


def fault(episode: Episode, outputs: int) -> str | None:
    """What is wrong with a task's data: one line without its end; None if nothing is.

    Args:
        outputs: classes a label may have, 0 to ``outputs - 1``; not looked at for a regression.
    """
    for name, tensor in (("inputs", episode.inputs), ("support targets", episode.support_targets),
                         ("query targets", episode.query_targets)):
        if tensor.is_floating_point():
            if not bool(torch.isfinite(tensor.sum())):  # one pass; the slow look only if need be
                wrong = ~torch.isfinite(tensor)
                if bool(wrong.any()):
                    return _not_finite(name, tensor, wrong)
        elif name != "inputs" and not _in_range(tensor, outputs):
            return (f"{name}: expected labels 0 to {outputs - 1}, got {int(tensor.min())} to "
                    f"{int(tensor.max())}")  # fmt: skip
    return None


def _not_finite(name: str, tensor: Tensor, wrong: Tensor) -> str:
    where = int(wrong.flatten(1).any(1).nonzero()[0])
    value = float(tensor[wrong][0])
    return f"{name}: expected finite numbers, got {value} (sample {where})"


def _in_range(labels: Tensor, outputs: int) -> bool:
    return int(labels.min()) >= 0 and int(labels.max()) < outputs


class CheckedStream:
    """A stream whose tasks have data that can be learnt.

    Args:
        stream: the tasks.
        outputs: as in `fault`.
        skip: whether the next task stands in for a bad one.
        say: told which were skipped.
        name: of the stream, in messages.

    Attributes:
        skipped: tasks that were, so far.
    """

    def __init__(self, stream: TaskStream, outputs: int, skip: bool,
                 say: Callable[[str], None], name: str) -> None:
        self.skipped = self._drawn = 0
        self._stream, self._outputs, self._skip = stream, outputs, skip
        self._say, self._name = say, name

    @property
    def state(self) -> Any:
        """As of `TaskStream`."""
        return self._stream.state

    @state.setter
    def state(self, state: Any) -> None:
        self._stream.state = state

    def own_random(self) -> AbstractContextManager[None]:
        """As of `TaskStream`."""
        return self._stream.own_random()

    def sample(self, where: str | None = None) -> Episode:
        """The next good task.

        Args:
            where: which one, for messages; by default its number in this stream.

        Raises:
            UserError: a task's data are wrong, and none is to be skipped, or too many in a row.
        """
        self._drawn += 1
        where = where or f"{self._name} task {self._drawn}"
        for _ in range(MOST_IN_A_ROW):
            episode = self._stream.sample()
            reason = fault(episode, self._outputs)
            if reason is None:
                return episode
            if not self._skip:
                raise UserError(f"{where}: {reason}; repair the data, or set on_bad_task=skip")
            self.skipped += 1
            self._say(f"skipped {where}: {reason}")
        raise UserError(
            f"{where}: expected a task that can be learnt, got {MOST_IN_A_ROW} bad ones in a row "
            f"({reason}); repair the data"
        )


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
