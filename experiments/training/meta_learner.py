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
from experiments.training.episodes import Episode, TaskStream
from l2l_implicit.distributed import ALONE, Ranks

Item = TypeVar("Item")

MEANS = ("hypergradient_error", "cg_residual", "cg_steps")
COUNTS = ("unsolved", "unsolved_inner", "unsolved_linear")
LEAST_L2 = 1e-4  # of a meta-learned one: below it the inner problem is not strongly convex


class Diverged(FloatingPointError):
    """The outer or an inner loop has left the finite numbers; theta is still finite."""


class Measure(NamedTuple):
    """How a kind of tasks is learnt (loss) and judged (score), of predictions and targets."""

    name: str  # of the score, as it is recorded
    loss: Loss
    score: Score
    unit: str  # for people: "%", and a factor of 100, for an accuracy in [0, 1]
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


MEASURES = {
    "classification": Measure("accuracy", nn.CrossEntropyLoss(), _accuracy, "%", 100.0, True),
    "regression": Measure(
        "mse", nn.MSELoss(), lambda p, t: nn.functional.mse_loss(p, t).item(), "", 1.0, False
    ),
}


class MetaLearner:
    """Theta (the backbone and what the algorithm meta-learns), its optimiser, and the steps.

    Args:
        optimizer, meta_lr, weight_decay: "adam" or "sgd", of the outer problem, its step size,
            and the share of theta that it takes away (Adam: decoupled, Loshchilov, Hutter 2019).
        channels_last: memory layout of images.
        ranks: the processes that share the tasks of a batch out.
        skip: leave tasks out whose numbers go wrong, and ``say`` which, instead of raising
            `Diverged`; ``skipped`` of them the last time.
    """

    def __init__(
        self, algorithms: Algorithms, measure: Measure, optimizer: str, meta_lr: float,
        channels_last: bool, ranks: Ranks = ALONE, skip: bool = False,
        say: Callable[[str], None] = print, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.ranks, self.skip, self._say, self.skipped = ranks, skip, say, 0
        self.algorithms, self.measure = algorithms, measure
        self.parameters = list(algorithms.training.network.parameters())
        adam = torch.optim.AdamW if weight_decay else torch.optim.Adam
        kind = {"adam": adam, "sgd": torch.optim.SGD}[optimizer]
        self.optimizer = kind(self.parameters, lr=meta_lr, weight_decay=weight_decay)
        self._meta_lr = meta_lr
        self.device = self.parameters[0].device
        self._channels_last = channels_last
        ranks.broadcast(p.data for p in self.parameters)

    def hypergradient(self, batch: Sequence[Episode]) -> list[QueryResult | None]:
        """Leave the mean hypergradient of this rank's share of the batch on theta.

        A result for each task of the share; None for one that was left out. Diverged: a number is
        not finite, and tasks are not to be skipped.
        """
        numbered = [(f"task {i} of {len(batch)}", task) for i, task in enumerate(batch, 1)]
        tasks = {name: self._laid_out(task) for name, task in self.ranks.share(numbered)}
        put_back, faults = snapshot(self.algorithms.training.network), dict[str, str]()
        try:
            return list(self._attempt([*tasks.values()]))
        except FloatingPointError as error:
            whole = str(error)
        for name, episode in tasks.items():
            put_back()
            try:
                self._attempt([episode])
            except FloatingPointError as error:
                faults[name] = f"{name}: {error}"
                if not self.skip:
                    break
        put_back()
        if not self.skip or not faults:
            raise Diverged(next(iter(faults.values()), whole))
        results = iter(self._attempt([task for name, task in tasks.items() if name not in faults]))
        for text in faults.values():
            self._say(f"skipped {text}")
        return [None if name in faults else next(results) for name in tasks]

    def anneal(self, share: float) -> None:
        """Set the outer step size to a half cosine's after this share of training: 1 gives 0.

        Loshchilov, Hutter (2017), eq. (5).
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self._meta_lr * (1 + math.cos(math.pi * share)) / 2

    def _attempt(self, episodes: Sequence[Episode]) -> list[QueryResult]:
        """Leave the mean gradient of these alone on theta."""
        self.optimizer.zero_grad()
        results = self.algorithms.training.learn(episodes, self.measure.score) if episodes else []
        if episodes:
            self._norm()
        return results

    def _norm(self) -> float:
        """Of the hypergradient on theta."""
        norms = [p.grad.norm() for p in self.parameters if p.grad is not None]
        norm = float(torch.stack(norms).norm())
        if not math.isfinite(norm):
            raise Diverged(f"expected a finite hypergradient, got norm {norm}; try a smaller lr")
        return norm

    def step(self, batch: Sequence[Episode]) -> dict[str, float]:
        """One outer iteration (Yang et al. 2025, Algorithm 1, lines 3 to 14).

        By name, means over the tasks of loss and score on the query set; the norm of the mean
        hypergradient; the implicit learners' diagnostics (their means, and how many were unsolved);
        wall seconds without data loading, and the process's own on all its threads; the tasks left
        out, where they may be. Diverged: before theta is touched, where a number is not finite;
        where tasks may be skipped, only if none of the batch is left.
        """
        start, cpu = time.perf_counter(), time.process_time()
        with self.ranks.together(Diverged):
            shared = self.hypergradient(batch)
        results = self._left(self.ranks.collect(shared))
        good = sum(result is not None for result in shared)
        self.ranks.average(self.parameters, good / len(results))
        norm = self._norm()
        self.optimizer.step()
        l2 = getattr(self.algorithms.training.learner, "l2", None)
        if isinstance(l2, nn.Parameter):
            l2.data.clamp_(min=LEAST_L2)
        noted = [r.diagnostics for r in results if r.diagnostics is not None]
        means = {name: [getattr(d, name) for d in noted] for name in MEANS if noted}
        means |= {"query_loss": [r.loss for r in results],
                  f"query_{self.measure.name}": [r.score for r in results]}  # fmt: skip
        spent = (time.perf_counter() - start, time.process_time() - cpu)
        seconds, cpu_seconds = map(max, zip(*self.ranks.gather(spent), strict=True))
        return {
            **{name: sum(values) / len(values) for name, values in means.items()},
            **{name: sum(getattr(d, name) for d in noted) for name in COUNTS if noted},
            **({"skipped_tasks": self.skipped} if self.skip else {}),
            "hypergradient_norm": norm, "seconds": seconds, "cpu_seconds": cpu_seconds,
        }  # fmt: skip

    def _left(self, all_of_them: Sequence[Item | None]) -> list[Item]:
        """Those that were not skipped, which are counted."""
        left = [item for item in all_of_them if item is not None]
        self.skipped = len(all_of_them) - len(left)
        if not left:
            raise Diverged(f"expected a task that can be learnt, got {self.skipped} that cannot")
        return left

    @torch.no_grad()
    def evaluate(
        self, tasks: TaskStream, number: int, progress: Callable[[Iterable[int]], Iterable[int]]
    ) -> Interval:
        """Mean score over ``number`` tasks; nothing is kept for a backward pass.

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

    def theta_state(self) -> dict[str, Any]:
        """Everything that evaluation depends on; `load_theta_state` is the inverse."""
        return {"network": self.algorithms.training.network.state_dict()}

    def load_theta_state(self, state: Mapping[str, Any]) -> None:
        self.algorithms.training.network.load_state_dict(state["network"])

    @torch.no_grad()
    def load_parameters(self, state: Mapping[str, Any]) -> None:
        """From what a run has left (``parameters.pt``): theta, and the buffers of its modules."""
        self.algorithms.backbone.load_state_dict(state["backbone"])
        self.algorithms.head.load_state_dict(state["head"])
        for parameter, value in zip(self.parameters, state["theta"], strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes; `load_state_dict` is the inverse."""
        return {**self.theta_state(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.load_theta_state(state)
        self.optimizer.load_state_dict(state["optimizer"])


def snapshot(module: nn.Module) -> Callable[[], None]:
    """A function that puts the module's buffers back to what they are now."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def put_back() -> None:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)

    return put_back


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % half width (1.96 standard errors) of independent values."""
    sample = torch.tensor(values, dtype=torch.float64)
    spread = sample.std().item() if len(values) > 1 else math.inf
    return Interval(sample.mean().item(), 1.96 * spread / math.sqrt(len(values)))


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
