"""One outer step, and evaluation: what every experiment does with an algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.algorithms import Loss, QueryResult, Score
from experiments.ingredients.algorithm import Algorithms
from experiments.ingredients.tasks import Episode, TaskStream
from l2l_implicit.distributed import ALONE, Ranks

LEAST_L2 = 1e-4  # of a meta-learned one: below it the inner problem is not strongly convex


class Measure(NamedTuple):
    """How a kind of tasks is learnt and judged.

    Attributes:
        name: of the score, as it is recorded.
        inner: the loss's name in `l2l_implicit.batched`.
        loss: of predictions and targets, a scalar.
        score: the same, a number.
        unit, factor: for people: "%" and 100 for an accuracy in [0, 1].
    """

    name: str
    inner: str
    loss: Loss
    score: Score
    unit: str
    factor: float

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
        "accuracy", "cross_entropy", nn.CrossEntropyLoss(), _accuracy, unit="%", factor=100.0
    ),
    "regression": Measure(
        "mse", "squared_error", nn.MSELoss(), _squared_error, unit="", factor=1.0
    ),
}


class OuterStep(NamedTuple):
    """What one outer iteration did; means over its tasks, seconds without data loading.

    Attributes:
        query_loss, query_score: on the query sets.
        hypergradient_norm: of the mean over tasks.
        inner_residual, cg_residual, cg_steps, unsolved_inner, unsolved_linear: of the implicit
            learners' diagnostics; None for algorithms that solve nothing.
        seconds, cpu_seconds: wall time, and the process's own on all its threads.
    """

    query_loss: float
    query_score: float
    hypergradient_norm: float
    inner_residual: float | None
    cg_residual: float | None
    cg_steps: float | None
    unsolved_inner: int | None
    unsolved_linear: int | None
    seconds: float
    cpu_seconds: float


class Diverged(ArithmeticError):
    """The outer or an inner loop has left the finite numbers; theta is still finite."""


class MetaLearner:
    """Theta (the backbone and what the algorithm meta-learns), its optimiser, and the steps.

    Args:
        algorithms: how tasks are learnt in training and in evaluation.
        measure: how they are judged.
        optimizer: "adam" or "sgd", of the outer problem.
        meta_lr: its step size.
        channels_last: memory layout of images.
        ranks: the processes that share the tasks of a batch out.
    """

    def __init__(
        self,
        algorithms: Algorithms,
        measure: Measure,
        optimizer: str,
        meta_lr: float,
        channels_last: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.algorithms, self.measure = algorithms, measure
        self.parameters = algorithms.training.theta()
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = kind(self.parameters, lr=meta_lr)
        self.device = self.parameters[0].device
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        ranks.broadcast(p.data for p in self.parameters)

    def hypergradient(self, batch: Sequence[Episode]) -> list[QueryResult]:
        """Leave the mean hypergradient of this rank's share of the batch on theta.

        Raises:
            Diverged: where a number is not finite.
        """
        self.optimizer.zero_grad()
        episodes = [self._laid_out(episode) for episode in self.ranks.share(batch)]
        if not episodes:
            return []
        try:
            return self.algorithms.training.learn(episodes, self.measure.score)
        except FloatingPointError as error:
            raise Diverged(str(error)) from error

    def step(self, batch: Sequence[Episode]) -> OuterStep:
        """One outer iteration (Yang et al. 2025, Algorithm 1, lines 3 to 14).

        Raises:
            Diverged: before theta is touched, where a number is not finite.
        """
        start, cpu = time.perf_counter(), time.process_time()
        with self.ranks.together(Diverged):
            shared = self.hypergradient(batch)
        results = self.ranks.collect(shared)
        self.ranks.average(self.parameters, len(shared) / len(batch))
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        norm = float(torch.stack(norms).norm())
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
            inner_residual=_mean(d.inner_residual for d in noted) if noted else None,
            cg_residual=_mean(d.cg_residual for d in noted) if noted else None,
            cg_steps=_mean(d.cg_steps for d in noted) if noted else None,
            unsolved_inner=sum(d.unsolved_inner for d in noted) if noted else None,
            unsolved_linear=sum(d.unsolved_linear for d in noted) if noted else None,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )

    @torch.no_grad()
    def evaluate(
        self, tasks: TaskStream, number: int, progress: Callable[[Iterable[int]], Iterable[int]]
    ) -> Interval:
        """Mean score over ``number`` tasks; nothing is kept for a backward pass.

        Raises:
            Diverged: an inner loop left the finite numbers.
        """
        scores = []
        with self.ranks.together(Diverged):
            for i in progress(range(number)):
                episode = tasks.sample()
                if i % self.ranks.size == self.ranks.rank:
                    scores.append(self._score(self._laid_out(episode)))
        return interval(self.ranks.collect(scores))

    def _score(self, episode: Episode) -> float:
        try:
            adapted = self.algorithms.evaluation.adapt(episode)
        except FloatingPointError as error:
            raise Diverged(str(error)) from error
        return self.measure.score(adapted.predictions, episode.query_targets)

    def _laid_out(self, episode: Episode) -> Episode:
        """The episode on the parameters' device, its images in the configured memory layout."""
        inputs, support, query = (t.to(self.device) for t in episode)
        if inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=self._format)
        return Episode(inputs, support, query)

    @torch.no_grad()
    def _project(self) -> None:
        """Keep a meta-learned regulariser where the inner problem is strongly convex."""
        l2 = getattr(self.algorithms.training.learner, "l2", None)
        if isinstance(l2, nn.Parameter):
            l2.clamp_(min=LEAST_L2)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes."""
        return {
            "network": self.algorithms.training.network().state_dict(),
            "theta": [p.detach().clone() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.algorithms.training.network().load_state_dict(state["network"])
        for parameter, value in zip(self.parameters, state["theta"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % half width (1.96 standard errors) of independent values."""
    sample = torch.tensor(values, dtype=torch.float64)
    spread = sample.std().item() if len(values) > 1 else math.inf
    return Interval(sample.mean().item(), 1.96 * spread / math.sqrt(len(values)))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
