"""One outer step, and evaluation: what every experiment does with an algorithm.

Numbers may go wrong on the way (a loss, an inner step, a hypergradient that is not finite):
``on_bad_task=stop`` ends training with the result of the last finite theta, ``skip`` leaves the
task out of its meta batch, or out of the score.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from experiments.training.algorithms import Algorithms, Loss, QueryResult, Score
from experiments.training.episodes import CheckedStream, Episode, TaskStream
from l2l_implicit.distributed import ALONE, Ranks

Item = TypeVar("Item")

LEAST_L2 = 1e-4  # of a meta-learned one: below it the inner problem is not strongly convex


class Diverged(ArithmeticError):
    """The outer or an inner loop has left the finite numbers; theta is still finite."""


class Measure(NamedTuple):
    """How a kind of tasks is learnt and judged.

    Attributes:
        name: of the score, as it is recorded.
        loss: of predictions and targets, a scalar.
        score: the same, a number.
        unit, factor: for people: "%" and 100 for an accuracy in [0, 1].
        larger_is_better: or the smaller one.
    """

    name: str
    loss: Loss
    score: Score
    unit: str
    factor: float
    larger_is_better: bool

    def better(self, new: float, old: float) -> bool:
        """Whether one score is better than another."""
        return new > old if self.larger_is_better else new < old

    def show(self, value: Interval) -> str:
        """A mean and its 95 % interval for people."""
        digits = 1 if self.unit else 3
        mean, half = self.factor * value.mean, self.factor * value.half_width
        return f"{mean:.{digits}f} ± {half:.{digits}f} {self.unit}".rstrip()


class Interval(NamedTuple):
    """A mean over tasks and the half width of its 95 % confidence interval."""

    mean: float
    half_width: float


def _accuracy(predictions: Tensor, targets: Tensor) -> float:
    return (predictions.argmax(1) == targets).double().mean().item()


def _squared_error(predictions: Tensor, targets: Tensor) -> float:
    return nn.functional.mse_loss(predictions, targets).item()


MEASURES = {
    "classification": Measure(
        "accuracy", nn.CrossEntropyLoss(), _accuracy, "%", 100.0, True
    ),
    "regression": Measure("mse", nn.MSELoss(), _squared_error, "", 1.0, False),
}


class OuterStep(NamedTuple):
    """What one outer iteration did; means over its tasks, seconds without data loading.

    Attributes:
        query_loss, query_score: on the query sets.
        hypergradient_norm: of the mean over tasks.
        hypergradient_error, cg_residual, cg_steps, unsolved, unsolved_inner, unsolved_linear: of
            the implicit learners' diagnostics; None for algorithms that solve nothing.
        seconds, cpu_seconds: wall time, and the process's own on all its threads.
        skipped_tasks: left out because their numbers went wrong; None where none may be.
    """

    query_loss: float
    query_score: float
    hypergradient_norm: float
    hypergradient_error: float | None
    cg_residual: float | None
    cg_steps: float | None
    unsolved: int | None
    unsolved_inner: int | None
    unsolved_linear: int | None
    seconds: float
    cpu_seconds: float
    skipped_tasks: int | None = None


class MetaLearner:
    """Theta (the backbone and what the algorithm meta-learns), its optimiser, and the steps.

    Args:
        algorithms: how tasks are learnt in training and in evaluation.
        measure: how they are judged.
        optimizer: "adam" or "sgd", of the outer problem.
        meta_lr: its step size.
        channels_last: memory layout of images.
        ranks: the processes that share the tasks of a batch out.
        skip: leave tasks out whose numbers go wrong, instead of raising `Diverged`.
        say: told which were left out.

    Attributes:
        skipped: tasks that the last step or evaluation left out.
    """

    def __init__(
        self,
        algorithms: Algorithms,
        measure: Measure,
        optimizer: str,
        meta_lr: float,
        channels_last: bool,
        ranks: Ranks = ALONE,
        skip: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.ranks, self.skip, self._say, self.skipped = ranks, skip, say, 0
        self.algorithms, self.measure = algorithms, measure
        self.parameters = algorithms.training.theta()
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = kind(self.parameters, lr=meta_lr)
        self.device = self.parameters[0].device
        self._channels_last = channels_last
        ranks.broadcast(p.data for p in self.parameters)

    def hypergradient(self, batch: Sequence[Episode]) -> list[QueryResult | None]:
        """Leave the mean hypergradient of this rank's share of the batch on theta.

        Returns:
            A result for each task of the share; None for one that was left out.

        Raises:
            Diverged: where a number is not finite, and tasks are not to be skipped.
        """
        numbered = [(f"task {i + 1} of {len(batch)}", task) for i, task in enumerate(batch)]
        tasks = [(name, self._laid_out(task)) for name, task in self.ranks.share(numbered)]
        network = self.algorithms.training.network()
        results, faults = learn(self._attempt, tasks, network, self.skip)
        for text in faults:
            self._say(f"skipped {text}")
        return results

    def _attempt(self, episodes: Sequence[Episode]) -> list[QueryResult]:
        self.optimizer.zero_grad()
        if not episodes:
            return []
        results = self.algorithms.training.learn(episodes, self.measure.score)
        norm = self._norm()
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"expected a finite hypergradient, got norm {norm}; try a smaller lr"
            )
        return results

    def _norm(self) -> float:
        """Of the hypergradient on theta."""
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        return float(torch.stack(norms).norm())

    def step(self, batch: Sequence[Episode]) -> OuterStep:
        """One outer iteration (Yang et al. 2025, Algorithm 1, lines 3 to 14).

        Raises:
            Diverged: before theta is touched, where a number is not finite; where tasks may be
                skipped, only if none of the batch is left.
        """
        start, cpu = time.perf_counter(), time.process_time()
        with self.ranks.together(Diverged):
            shared = self.hypergradient(batch)
        results = self._left(self.ranks.collect(shared))
        good = sum(result is not None for result in shared)
        self.ranks.average(self.parameters, good / len(results))
        norm = self._norm()
        if not math.isfinite(norm):
            raise Diverged(f"expected a finite hypergradient, got norm {norm}; try a smaller lr")
        self.optimizer.step()
        self._project()
        noted = [r.diagnostics for r in results if r.diagnostics is not None]
        spent = (time.perf_counter() - start, time.process_time() - cpu)
        seconds, cpu_seconds = map(max, zip(*self.ranks.gather(spent), strict=True))
        return OuterStep(
            query_loss=_mean(result.loss for result in results),
            query_score=_mean(result.score for result in results),
            hypergradient_norm=norm,
            hypergradient_error=_mean(d.hypergradient_error for d in noted) if noted else None,
            cg_residual=_mean(d.cg_residual for d in noted) if noted else None,
            cg_steps=_mean(d.cg_steps for d in noted) if noted else None,
            unsolved=sum(d.unsolved for d in noted) if noted else None,
            unsolved_inner=sum(d.unsolved_inner for d in noted) if noted else None,
            unsolved_linear=sum(d.unsolved_linear for d in noted) if noted else None,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            skipped_tasks=self.skipped if self.skip else None,
        )

    def _left(self, all_of_them: Sequence[Item | None]) -> list[Item]:
        """Those that were not skipped, which are counted."""
        left = [item for item in all_of_them if item is not None]
        self.skipped = len(all_of_them) - len(left)
        if not left:
            raise Diverged(f"expected a task that can be learnt, got {self.skipped} that cannot")
        return left

    @torch.no_grad()
    def evaluate(
        self,
        tasks: TaskStream | CheckedStream,
        number: int,
        progress: Callable[[Iterable[int]], Iterable[int]],
    ) -> Interval:
        """Mean score over ``number`` tasks; nothing is kept for a backward pass.

        Raises:
            Diverged: an inner loop left the finite numbers, and tasks are not to be skipped.
        """
        scores: list[float | None] = []
        with self.ranks.together(Diverged):
            for i in progress(range(number)):
                episode = tasks.sample()
                if i % self.ranks.size == self.ranks.rank:
                    name = f"task {i + 1} of {number}"
                    scores.append(self._score(name, self._laid_out(episode)))
        return interval(self._left(self.ranks.collect(scores)))

    def _score(self, name: str, episode: Episode) -> float | None:
        try:
            adapted = self.algorithms.evaluation.adapt(episode)
            if not bool(torch.isfinite(adapted.predictions).all()):
                raise FloatingPointError("predictions: expected finite numbers, got others")
        except FloatingPointError as error:
            if not self.skip:
                raise Diverged(f"{name}: {error}") from error
            self._say(f"skipped {name}: {error}")
            return None
        return self.measure.score(adapted.predictions, episode.query_targets)

    def _laid_out(self, episode: Episode) -> Episode:
        """The episode on the parameters' device, its images in the configured memory layout."""
        inputs, support, query = (t.to(self.device) for t in episode)
        if inputs.dim() == 4:
            inputs = laid_out(inputs, self._channels_last)
        return Episode(inputs, support, query)

    @torch.no_grad()
    def _project(self) -> None:
        """Keep a meta-learned regulariser where the inner problem is strongly convex."""
        l2 = getattr(self.algorithms.training.learner, "l2", None)
        if isinstance(l2, nn.Parameter):
            l2.clamp_(min=LEAST_L2)

    def theta_state(self) -> dict[str, Any]:
        """Everything that evaluation depends on."""
        return {
            "network": self.algorithms.training.network().state_dict(),
            "theta": [p.detach().clone() for p in self.parameters],
        }

    @torch.no_grad()
    def load_theta_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of `theta_state`."""
        self.algorithms.training.network().load_state_dict(state["network"])
        for parameter, value in zip(self.parameters, state["theta"], strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes."""
        return {**self.theta_state(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.load_theta_state(state)
        self.optimizer.load_state_dict(state["optimizer"])


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % half width (1.96 standard errors) of independent values."""
    sample = torch.tensor(values, dtype=torch.float64)
    spread = sample.std().item() if len(values) > 1 else math.inf
    return Interval(sample.mean().item(), 1.96 * spread / math.sqrt(len(values)))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


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


def laid_out(images: Tensor, channels_last: bool) -> Tensor:
    """Images of shape (n, channels, height, width) in one of torch's two layouts.

    One-channel images are in both at once. Their strides, which `contiguous` leaves as they are,
    decide which one a convolution with one input channel takes: in the default one FOMAML's step
    takes 1.4 times as long on a CPU. Here the strides say what is meant.
    """
    _, channels, height, width = images.shape
    pixels = height * width
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        return images.as_strided(images.shape, (pixels * channels, 1, width * channels, channels))
    return images.contiguous().as_strided(images.shape, (pixels * channels, pixels, width, 1))
