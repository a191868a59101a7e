"""Few-shot tasks as the training loop sees them: streams of episodes, and their sizes.

A task's own data may be wrong (nan in an image, a label out of range): ``on_bad_task=stop`` ends
the run with an error, ``skip`` takes the next task instead.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.tracking import UserError, wrong
from experiments.tracking.errors import one_line
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

    learn2learn's ``taskset`` draws from Python's ``random``, of which a stream has its own state.

    Args:
        shots, outputs: support samples a class; as in `fault`.
        name: in messages.
        skip: the next task stands in for one whose data are wrong, and ``say`` is told;
            ``skipped`` of them so far.
    """

    def __init__(
        self, taskset: Any, shots: int, outputs: int, seed: int, name: str, skip: bool,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.taskset, self._shots, self._outputs = taskset, shots, outputs
        self.state = random.Random(seed).getstate()
        self.skip, self._name, self._say = skip, name, say
        self.skipped = self._drawn = 0

    def sample(self, where: str | None = None) -> Episode:
        """The next good task; ``where`` names it in messages, by default by its number.

        UserError: a task's data are wrong, and none is to be skipped, or too many in a row.
        """
        self._drawn += 1
        where = where or f"{self._name} task {self._drawn}"
        for _ in range(MOST_IN_A_ROW):
            try:
                episode = self._draw()
                if (reason := fault(episode, self._outputs)) is None:
                    return episode
            except (OSError, ValueError) as error:  # of a picture that cannot be read
                reason = one_line(error)
            if not self.skip:
                raise UserError(f"{where}: {reason}; repair the data, or set on_bad_task=skip")
            self.skipped += 1
            self._say(f"skipped {where}: {reason}")
        got = f"{MOST_IN_A_ROW} bad ones in a row ({reason})"
        raise wrong(where, "a task that can be learnt", got, "repair the data")

    def _draw(self) -> Episode:
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

    Labels are 0 to ``outputs - 1``; a regression has none.
    """
    names = ("inputs", "support targets", "query targets")
    for name, tensor in zip(names, episode, strict=True):
        if not tensor.is_floating_point():
            least, most = (0, 0) if name == "inputs" else map(int, tensor.aminmax())
            if least < 0 or most >= outputs:
                return f"{name}: expected labels 0 to {outputs - 1}, got {least} to {most}"
        elif not bool(torch.isfinite(tensor.sum())):  # one pass; the slow look only if need be
            bad = ~torch.isfinite(tensor)
            if bool(bad.any()):
                where, value = int(bad.flatten(1).any(1).nonzero()[0]), float(tensor[bad][0])
                return f"{name}: expected finite numbers, got {value} (sample {where})"
    return None


class Tasks:
    """The task sets train, validation and test of one data set, of a kind of `Measure`.

    Args:
        sets, name, options: the data set, and what it was made with.
        train, test: sizes of training tasks, and of validation and test tasks.
    """

    def __init__(
        self, sets: Any, name: str, train: Sizes, test: Sizes, options: Mapping[str, Any]
    ) -> None:
        self.sets, self.name = sets, canonical(name)
        self.kind = kind_of(self.name)
        self._sizes = {"train": train, "validation": test, "test": test}
        self._options = dict(options)

    def stream(
        self, mode: str, seed: int, skip: bool = False, say: Callable[[str], None] = print
    ) -> TaskStream:
        """Tasks of ``mode`` (train, validation or test)."""
        ways, shots, _ = self.sizes(mode)  # first: it knows the modes
        return TaskStream(getattr(self.sets, mode), shots, ways, seed, mode, skip, say)

    def sizes(self, mode: str) -> Sizes:
        """Ways, shots and queries of the tasks of ``mode``."""
        checks.choice("mode", mode, self._sizes)
        ways, shots, queries = self._sizes[mode]
        return Sizes(ways if self.kind == "classification" else 1, shots, queries)

    def input_shape(self) -> torch.Size:
        """Of one sample: channels, height, width; ``[1]`` for sine."""
        return torch.as_tensor(self.sets.train.dataset[0][0]).shape

    def describe(self) -> dict[str, Any]:
        """What was resolved, fit for JSON: data set, options, sizes, classes and images a split."""
        return {
            "name": self.name, "kind": self.kind, "options": dict(self._options),
            "sizes": {mode: self.sizes(mode)._asdict() for mode in self._sizes},
            "input_shape": list(self.input_shape()),
            **describe_tasksets(self.sets),
        }  # fmt: skip
