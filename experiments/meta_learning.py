"""One outer step, and evaluation: what every experiment does with an algorithm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.ingredients.tasks import Episode, TaskStream
from l2l_implicit import Diagnostics


class QueryResult(NamedTuple):
    """A task's query loss (with its graph), accuracy in [0, 1] and the learner's diagnostics."""

    loss: Tensor
    accuracy: float
    diagnostics: Diagnostics


class OuterStep(NamedTuple):
    """What one outer iteration did; means over its tasks, ``seconds`` without data loading."""

    query_loss: float
    query_accuracy: float
    hypergradient_norm: float
    inner_residual: float
    cg_residual: float
    cg_steps: float
    unsolved_inner: int
    unsolved_linear: int
    seconds: float


class Interval(NamedTuple):
    """A mean accuracy in [0, 1] and the half width of its 95 % confidence interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.half_width:.1f} %"


class MetaLearner:
    """Theta (the backbone and what the algorithm meta-learns), its optimiser, and the steps.

    Support and query images pass the backbone together, once a task, in training mode, as in
    Yang et al.: batch statistics are those of the task (transductive).

    Args:
        backbone: images to features ``[n, d]``.
        algorithm: an object of `experiments.ingredients.algorithm`.
        meta_lr: outer step size of Adam.
        channels_last: memory layout of the images.
    """

    def __init__(
        self, backbone: nn.Module, algorithm: Any, meta_lr: float, channels_last: bool
    ) -> None:
        self.backbone, self.algorithm = backbone, algorithm
        self.parameters = [*backbone.parameters(), *algorithm.head.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, meta_lr)
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._loss = nn.CrossEntropyLoss()

    def query(self, episode: Episode) -> QueryResult:
        """Adapt to the support set, and look at the query set."""
        features = self.backbone(episode.images.contiguous(memory_format=self._format))
        shots = len(episode.support_labels)
        learner, diagnostics = self.algorithm.adapt(features[:shots], episode.support_labels)
        logits = learner(features[shots:])
        loss = self._loss(logits, episode.query_labels)
        accuracy = (logits.argmax(1) == episode.query_labels).double().mean().item()
        return QueryResult(loss, accuracy, diagnostics)

    def hypergradient(self, batch: Sequence[Episode]) -> list[QueryResult]:
        """Leave the mean hypergradient of the batch on theta; one task in memory at a time."""
        self.optimizer.zero_grad()
        results = []
        for episode in batch:
            result = self.query(episode)
            (result.loss / len(batch)).backward()
            results.append(result._replace(loss=result.loss.detach()))
        return results

    def step(self, batch: Sequence[Episode]) -> OuterStep:
        """One outer iteration (Yang et al. 2025, Algorithm 1, lines 3 to 14)."""
        start = time.perf_counter()
        results = self.hypergradient(batch)
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        self.optimizer.step()
        seconds = time.perf_counter() - start
        noted = [result.diagnostics for result in results]
        return OuterStep(
            query_loss=_mean(float(result.loss) for result in results),
            query_accuracy=_mean(result.accuracy for result in results),
            hypergradient_norm=float(torch.stack(norms).norm()),
            inner_residual=_mean(d.inner_residual for d in noted),
            cg_residual=_mean(d.cg_residual for d in noted),
            cg_steps=_mean(d.cg_steps for d in noted),
            unsolved_inner=sum(d.unsolved_inner for d in noted),
            unsolved_linear=sum(d.unsolved_linear for d in noted),
            seconds=seconds,
        )

    @torch.no_grad()
    def evaluate(
        self, tasks: TaskStream, number: int, progress: Callable[[Iterable[int]], Iterable[int]]
    ) -> Interval:
        """Accuracy over ``number`` tasks; nothing is kept for a backward pass."""
        accuracies = [self.query(tasks.sample()).accuracy for _ in progress(range(number))]
        return interval(accuracies)


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % half width (1.96 standard errors) of independent values."""
    sample = torch.tensor(values, dtype=torch.float64)
    spread = sample.std().item() if len(values) > 1 else math.inf
    return Interval(sample.mean().item(), 1.96 * spread / math.sqrt(len(values)))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
