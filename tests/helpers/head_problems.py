"""Random few-shot linear heads as data, ordinary and hostile ones, each with its truth."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from head_oracle import (
    LONG,
    Array,
    Inner,
    Samples,
    Truth,
    distance,
    hypergradient,
    long,
    of_weights,
    short,
    times,
)
from torch import Tensor, nn

TASKS = 3  # problems with the same settings, adapted together too
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Settings:
    """What T tasks together must share."""

    family: str
    seed: int
    ways: int
    shots: int
    width: int
    l2: float
    squared: bool
    reduction: str
    bias: bool
    anchor: str


@dataclass
class Problem:
    """One task; every number is one of float32, so that both precisions see the same."""

    settings: Settings
    task: int
    scale: float
    traits: tuple[str, ...]
    x: Tensor  # [n, d], float64
    y: Tensor  # [n] classes or [n, k] numbers
    query: Tensor
    query_y: Tensor
    head: nn.Linear  # float64

    @property
    def name(self) -> str:
        s = self.settings
        kind = f"{s.ways}x{s.shots}, {s.width} features of {self.scale:.2g}, l2={s.l2:.2g}"
        loss = f"{'squared error' if s.squared else 'cross-entropy'} {s.reduction}"
        more = f"{loss}, {'bias, ' if s.bias else ''}anchor {s.anchor}"
        return f"{s.family} {s.seed}.{self.task} ({kind}, {more}: {' '.join(self.traits)})"


def log_uniform(draw: random.Random, low: float, high: float) -> float:
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def whole(draw: random.Random, low: int, high: int) -> int:
    return min(high, int(log_uniform(draw, low, high + 1)))


def single(value: float) -> float:
    """The nearest number of float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def settings_of(family: str, seed: int) -> Settings:
    draw = random.Random(f"{family} {seed}")
    return Settings(
        family=family,
        seed=seed,
        ways=whole(draw, 2, 20),
        shots=whole(draw, 1, 20),
        width=whole(draw, 16, 256),
        l2=single(log_uniform(draw, 1e-3 if family == "ordinary" else 1e-6, 10.0)),
        squared=draw.random() < 0.4,
        reduction=draw.choice(["mean", "sum"]),
        bias=draw.random() < 0.6,
        anchor=draw.choice(["zero", "init"]),
    )


def problems(family: str, seed: int, tasks: int = TASKS) -> list[Problem]:
    """Those of one seed: the same settings and start, other data."""
    settings = settings_of(family, seed)
    generator = torch.Generator().manual_seed(1000 * seed + (family == "hostile"))
    head = nn.Linear(settings.width, settings.ways, bias=settings.bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-1, 1, generator=generator).mul_(settings.width**-0.5)
    return [make(settings, task, head.double(), generator) for task in range(tasks)]


def make(settings: Settings, task: int, head: nn.Linear, generator: torch.Generator) -> Problem:
    draw = random.Random(f"{settings.family} {settings.seed} {task}")
    ways, n = settings.ways, settings.ways * settings.shots
    hostile = settings.family == "hostile"
    scale = log_uniform(draw, 1e-3, 1e4) if hostile else log_uniform(draw, 0.1, 30.0)
    labels, query_labels = torch.arange(n) % ways, torch.arange(2 * ways) % ways
    x = torch.randn(n + 2 * ways, settings.width, generator=generator)
    centres = torch.randn(ways, settings.width, generator=generator)
    traits = list(hostile_traits(draw) if hostile else ordinary_traits(draw))
    distance_ = 10.0 if "separable" in traits else draw.choice([0.0, 0.3, 1.0])
    x += distance_ * centres[torch.cat([labels, query_labels])]
    if draw.random() < 0.5:
        x.relu_()
    x *= scale
    for trait in traits:
        spoil(trait, x, scale, labels, n, draw)
    y, query_y = labels, query_labels
    if settings.squared:
        y, query_y = (F.one_hot(part, ways).double() for part in (labels, query_labels))
        if draw.random() < 0.5:
            y = y + torch.randn(n, ways, generator=generator)
    data = x.float().double()
    y = y.float().double() if settings.squared else y
    return Problem(settings, task, scale, tuple(traits), data[:n], y, data[n:], query_y, head)


def ordinary_traits(draw: random.Random) -> Iterator[str]:
    if draw.random() < 0.3:
        yield "constant"
    if draw.random() < 0.3:
        yield "copied features"


def hostile_traits(draw: random.Random) -> list[str]:
    names = ["zero features", "all zero", "one class", "separable", "copied samples"]
    weights = [3, 1, 3, 3, 3]
    names, weights = [*names, "huge", "contradiction"], [*weights, 3, 2]
    return sorted(set(draw.choices(names, weights, k=draw.choice([0, 1, 1, 2]))))


def spoil(trait: str, x: Tensor, scale: float, labels: Tensor, n: int, draw: random.Random) -> None:
    """What makes a problem hard, in place; the first ``n`` rows are the support set."""
    width = x.shape[1]
    some = draw.sample(range(width), max(1, width // 8))
    if trait == "constant":
        x[:, some[: draw.choice([1, 1, 3])]] = single(scale * log_uniform(draw, 1.0, 10.0))
    elif trait == "copied features":
        x[:, some] = x[:, draw.sample(range(width), len(some))].clone()
    elif trait == "zero features":
        x[:, draw.sample(range(width), width - len(some))] = 0.0
        x[: max(1, n // 4)] = 0.0
    elif trait == "all zero":
        x[:n] = 0.0
    elif trait == "one class":
        labels.fill_(int(labels[-1]))
    elif trait == "copied samples":
        x[n // 2 : n] = x[: n - n // 2].clone()
    elif trait == "huge":
        x[:, some[0]] = single(scale * log_uniform(draw, 1e2, 1e5))
    elif trait == "contradiction":  # one sample of every class, n times
        x[:n] = x[0].clone()


# The truth.


class Known(NamedTuple):
    """A problem's truth, and its error where the right weights and the query loss are rounded."""

    truth: Truth
    floor: dict[str, float]  # by precision


def known(problem: Problem) -> Known:
    settings = problem.settings
    weight = problem.head.weight.detach().t()
    x, query = long(problem.x), long(problem.query)
    if settings.bias:
        weight = torch.cat([weight, problem.head.bias.detach().unsqueeze(0)])
        x, query = (long(F.pad(part, (0, 1), value=1.0)) for part in (problem.x, problem.query))
    start = long(weight) if settings.anchor == "init" else 0 * long(weight)
    loss = samples(problem.y, settings, settings.reduction)
    inner = Inner(x, loss, start, LONG(settings.l2))
    outer = samples(problem.query_y, settings, "mean")

    def query_slope(w: Array) -> Array:
        return times(query.T, outer.slope(outer.state(times(query, w))))

    truth, curvature = hypergradient(inner, query_slope, settings.width)
    floor = {}
    for name, dtype in PRECISIONS.items():
        b = rounded_slope(problem, truth.weights, dtype)
        features, l2, anchor = of_weights(curvature, truth.weights, b).answer(inner, settings.width)
        errors = compared(truth, short(features), float(l2), short(anchor))
        floor[name] = max(truth.rounding, *errors)
    return Known(truth, floor)


def samples(y: Tensor, settings: Settings, reduction: str) -> Samples:
    number = len(y) * (settings.ways if settings.squared else 1)
    dense = y if settings.squared else F.one_hot(y, settings.ways)
    return Samples(long(dense), settings.squared, 1 / LONG(number if reduction == "mean" else 1))


def rounded_slope(problem: Problem, weights: Array, dtype: torch.dtype) -> Array:
    """The query loss's gradient in the weights, as this precision has it at the minimum."""
    w = short(weights).to(dtype).requires_grad_()
    query = problem.query.to(dtype)
    if problem.settings.bias:
        logits = F.linear(query, w[:-1].t(), w[-1])
    else:
        logits = F.linear(query, w.t())
    (slope,) = torch.autograd.grad(query_loss(problem, logits), w)
    return long(slope)


def query_loss(problem: Problem, logits: Tensor) -> Tensor:
    return loss_of(problem.settings, logits, problem.query_y, "mean")


def loss_of(settings: Settings, logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    if settings.squared:
        return F.mse_loss(logits, y.to(logits.dtype), reduction=reduction)
    return F.cross_entropy(logits, y, reduction=reduction)


def compared(
    truth: Truth, features: Tensor, l2: float, start: Tensor | None
) -> tuple[float, float, float]:
    """Relative errors in the features, in ``l2`` (of what it sums), in the anchor."""
    scale = max(truth.l2_scale, abs(truth.l2))
    gap = abs(l2 - truth.l2)
    return (
        distance(long(features), long(truth.features)),
        gap / scale if scale else float(gap > 0),
        0.0 if start is None else distance(long(start), long(truth.start)),
    )
