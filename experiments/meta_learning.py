"""One outer step, and evaluation: what every experiment does with an algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.algorithms import Adapted, Loss
from experiments.ingredients.algorithm import Algorithms
from experiments.ingredients.tasks import Episode, TaskStream
from l2l_implicit import Diagnostics

LEAST_L2 = 1e-4  # of a meta-learned one: below it the inner problem is not strongly convex


class Measure(NamedTuple):
    """How a kind of tasks is learnt and judged.

    Attributes:
        name: of the score, as it is recorded.
        loss: of predictions and targets, a scalar.
        score: the same, a number.
        unit, factor: for people: "%" and 100 for an accuracy in [0, 1].
    """

    name: str
    loss: Loss
    score: Callable[[Tensor, Tensor], float]
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
    "classification": Measure("accuracy", nn.CrossEntropyLoss(), _accuracy, "%", 100.0),
    "regression": Measure("mse", nn.MSELoss(), _squared_error, "", 1.0),
}


class QueryResult(NamedTuple):
    """A task's query loss, score, and the learner's diagnostics if it has any."""

    loss: float
    score: float
    diagnostics: Diagnostics | None


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
    """

    def __init__(
        self,
        algorithms: Algorithms,
        measure: Measure,
        optimizer: str,
        meta_lr: float,
        channels_last: bool,
    ) -> None:
        self.algorithms, self.measure = algorithms, measure
        self.parameters = algorithms.training.theta()
        kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = kind(self.parameters, lr=meta_lr)
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def hypergradient(self, batch: Sequence[Episode]) -> list[QueryResult]:
        """Leave the mean hypergradient of the batch on theta; one task in memory at a time.

        Raises:
            Diverged: where a number is not finite.
        """
        self.optimizer.zero_grad()
        try:
            return [self._learn(self._laid_out(episode), 1.0 / len(batch)) for episode in batch]
        except FloatingPointError as error:
            raise Diverged(str(error)) from error

    def _learn(self, episode: Episode, weight: float) -> QueryResult:
        algorithm = self.algorithms.training
        adapted = algorithm.adapt(episode)
        loss = algorithm.loss(adapted.predictions, episode.query_targets)
        algorithm.backward(adapted, loss, weight)
        diagnostics = getattr(adapted.learner, "diagnostics", None)
        return QueryResult(loss.item(), self._score(adapted, episode), diagnostics)

    def step(self, batch: Sequence[Episode]) -> OuterStep:
        """One outer iteration (Yang et al. 2025, Algorithm 1, lines 3 to 14).

        Raises:
            Diverged: before theta is touched, where a number is not finite.
        """
        start, cpu = time.perf_counter(), time.process_time()
        results = self.hypergradient(batch)
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        norm = float(torch.stack(norms).norm())
        if not math.isfinite(norm):
            raise Diverged(f"expected a finite hypergradient, got norm {norm}; try a smaller lr")
        self.optimizer.step()
        self._project()
        noted = [r.diagnostics for r in results if r.diagnostics is not None]
        return OuterStep(
            query_loss=_mean(result.loss for result in results),
            query_score=_mean(result.score for result in results),
            hypergradient_norm=norm,
            inner_residual=_mean(d.inner_residual for d in noted) if noted else None,
            cg_residual=_mean(d.cg_residual for d in noted) if noted else None,
            cg_steps=_mean(d.cg_steps for d in noted) if noted else None,
            unsolved_inner=sum(d.unsolved_inner for d in noted) if noted else None,
            unsolved_linear=sum(d.unsolved_linear for d in noted) if noted else None,
            seconds=time.perf_counter() - start,
            cpu_seconds=time.process_time() - cpu,
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
        for _ in progress(range(number)):
            episode = self._laid_out(tasks.sample())
            try:
                adapted = self.algorithms.evaluation.adapt(episode)
            except FloatingPointError as error:
                raise Diverged(str(error)) from error
            scores.append(self._score(adapted, episode))
        return interval(scores)

    def _score(self, adapted: Adapted, episode: Episode) -> float:
        return self.measure.score(adapted.predictions.detach(), episode.query_targets)

    def _laid_out(self, episode: Episode) -> Episode:
        """The episode with its images in the configured memory layout."""
        if episode.inputs.dim() != 4:
            return episode
        return episode._replace(inputs=episode.inputs.contiguous(memory_format=self._format))

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
