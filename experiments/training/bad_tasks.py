"""Tasks that cannot be learnt: which one, why, and what becomes of it.

Two kinds. A task's own data are wrong (nan in an image, a label out of range): ``stop`` ends the
run with an error, ``skip`` takes the next task instead. Or numbers go wrong on the way (a loss, an
inner step, a hypergradient that is not finite): ``stop`` ends training with the result of the last
finite theta, ``skip`` leaves the task out of its meta batch, or out of the score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from experiments.tracking import UserError
from experiments.training.episodes import Episode, TaskStream

POLICIES = ("stop", "skip")
MOST_IN_A_ROW = 100


class Diverged(ArithmeticError):
    """The outer or an inner loop has left the finite numbers; theta is still finite."""


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


def learn(
    attempt: Callable[[Sequence[Episode]], list[Any]],
    tasks: Sequence[tuple[str, Episode]],
    network: nn.Module,
    skip: bool,
) -> tuple[list[Any], list[str]]:
    """Learn tasks; those whose numbers go wrong are left out, or named.

    Args:
        attempt: learns tasks, and leaves the gradient of those alone on theta; called again with
            fewer where it raises ``FloatingPointError``.
        tasks: each with a name for messages.
        network: whose buffers are put back before another attempt.
        skip: whether the bad ones are left out.

    Returns:
        A result for each task, None for one left out; and what was wrong with those.

    Raises:
        Diverged: one goes wrong and none is to be skipped.
    """
    before = [buffer.clone() for buffer in network.buffers()]
    try:
        return list(attempt([episode for _, episode in tasks])), []
    except FloatingPointError as error:
        whole = str(error)
    faults = []
    for name, episode in tasks:
        _put_back(network, before)
        faults.append(_fault_of(attempt, name, episode))
        if faults[-1] and not skip:
            break
    _put_back(network, before)
    found = [text for text in faults if text is not None]
    if not skip or not found:
        raise Diverged(found[0] if found else whole)
    good = [episode for (_, episode), text in zip(tasks, faults, strict=True) if text is None]
    results = iter(attempt(good))
    return [next(results) if text is None else None for text in faults], found


def _fault_of(attempt: Callable[[Sequence[Episode]], Any], name: str, episode: Episode
              ) -> str | None:  # fmt: skip
    try:
        attempt([episode])
    except FloatingPointError as error:
        return f"{name}: {error}"
    return None


@torch.no_grad()
def _put_back(network: nn.Module, before: Sequence[Tensor]) -> None:
    for buffer, value in zip(network.buffers(), before, strict=True):
        buffer.copy_(value)
