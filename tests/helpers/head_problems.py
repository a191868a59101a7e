"""Random few-shot linear heads as data, ordinary and hostile ones, each with its truth."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

# The oracle: the hypergradient of a linear head in extended precision; no code of the library's.
#
# The inner problem is ``c * loss(X W, y) + l2/2 ||W - A||^2`` over ``W`` of shape ``[d, k]`` (bias:
# one more column of ones in ``X``), strongly convex with constant ``l2``. Right-hand sides and
# solutions are of shape ``[d, k]``, features ``[n, d]``, logits ``[n, k]``. Systems are solved by
# conjugate gradient in float64, preconditioned by the diagonal blocks of the Hessian in the span of
# the samples; what they have left is evaluated in numpy's long double (80 bits on x86) and solved
# for again, until nothing is left.
#
# The answer is computed twice: with the weights as unknowns, and with one unknown a logit, in which
# the equations, their cancellations and their rounding are others (the slope of the loss is then an
# unknown, not a difference of two nearly equal numbers). `Truth.doubt`, the relative distance of
# the two answers, says how far the oracle itself can be trusted.


Array = NDArray[np.longdouble]
Linear = Callable[[Tensor], Tensor]
LONG = np.longdouble
ROUNDING = 1e-15


def long(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().astype(LONG)


def short(array: Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))


def times(a: Array, b: Array) -> Array:
    """A product; einsum's loops are twice as fast as matmul's."""
    return np.einsum("ij,jk->ik", a, b)


@dataclass
class Samples:
    """``c * sum of loss(f_i, y_i)`` of logits ``f`` ``[n, k]``, in long double."""

    y: Array  # one row a sample: one-hot, or numbers
    squared: bool
    c: LONG

    def state(self, f: Array) -> Array:
        """What slope and curvature are computed from: probabilities, or the outputs."""
        if self.squared:
            return f
        e = np.exp(f - f.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    def slope(self, p: Array) -> Array:
        return (2 if self.squared else 1) * self.c * (p - self.y)

    def curve(self, p: Array, u: Array) -> Array:
        """The second derivative times ``u`` ``[n, k]``."""
        if self.squared:
            return 2 * self.c * u
        return self.c * p * (u - (p * u).sum(axis=1, keepdims=True))

    def diagonal(self, p: Array) -> Array:
        if self.squared:
            return np.full_like(p, 2 * self.c)
        return self.c * p * (1 - p)


@dataclass
class Inner:
    """The regularised problem."""

    x: Array  # [n, d]
    loss: Samples
    anchor: Array  # [d, k]
    l2: LONG

    def state(self, w: Array) -> Array:
        return self.loss.state(times(self.x, w))

    def slope(self, w: Array, p: Array) -> Array:
        return times(self.x.T, self.loss.slope(p)) + self.l2 * (w - self.anchor)

    def product(self, p: Array, v: Array) -> Array:
        return times(self.x.T, self.loss.curve(p, times(self.x, v))) + self.l2 * v


class Curvature:
    """Solves with the Hessian ``X' S X + l2`` at probabilities ``p``; shapes ``[d, k]``."""

    def __init__(self, inner: Inner, basis: tuple[Tensor, Tensor], p: Array) -> None:
        self.inner, self.p = inner, p
        self.p64, self.l2 = short(p), float(inner.l2)
        self.basis, self.coordinates = basis  # orthonormal [d, r]; [n, r]
        self.gauge = not inner.loss.squared  # softmax: one number more for all classes is no change
        weights = short(inner.loss.diagonal(p)).clamp_min(0.0).sqrt()  # [n, k]
        rows = weights.t().unsqueeze(2) * self.coordinates  # [k, n, r]
        identity = self.l2**0.5 * torch.eye(self.coordinates.shape[1], dtype=torch.float64)
        stacked = torch.cat([rows, identity.expand(len(rows), -1, -1)], dim=1)
        factor = torch.linalg.qr(stacked, mode="r").R
        inverse = torch.linalg.solve_triangular(factor, identity / self.l2**0.5, upper=True)
        self.blocks = inverse @ inverse.mT  # [k, r, r], of each class alone
        self.total = torch.linalg.cholesky(self.blocks.sum(0)) if self.gauge else None

    def solve(self, b: Array) -> Array:
        """To rounding in long double where the system allows it."""
        v, before = np.zeros_like(b), np.inf
        for _ in range(8):
            left = b - self.inner.product(self.p, v)
            size = float(np.sqrt((left**2).sum())) / self.l2
            if not size < 0.5 * before:
                break
            better, before = v, size
            if size <= ROUNDING * float(np.sqrt((v**2).sum())):
                break
            v = v + self.direction(left)
        return better

    def direction(self, b: Array) -> Array:
        """An approximate solution, in float64, for a right-hand side of any size."""
        scale = np.abs(b).max()
        if scale == 0:
            return np.zeros_like(b)
        right = short(b / scale)
        inside = self.basis.t() @ right
        outside = right - self.basis @ inside
        outside -= self.basis @ (self.basis.t() @ outside)
        common = inside.mean(1, keepdim=True) if self.gauge else torch.zeros_like(inside[:, :1])
        solved = conjugate_gradient(self.apply, self.precondition, inside - common)
        v = self.basis @ (solved + common / self.l2) + outside / self.l2
        return v.numpy().astype(b.dtype) * scale

    def apply(self, v: Tensor) -> Tensor:
        """The product in the coordinates of the span, ``[r, k]``."""
        u, loss = self.coordinates @ v, self.inner.loss
        s = 2 * u if loss.squared else self.p64 * (u - (self.p64 * u).sum(1, keepdim=True))
        return float(loss.c) * (self.coordinates.t() @ s) + self.l2 * v

    def precondition(self, r: Tensor) -> Tensor:
        """The inverse of the diagonal blocks, among those ``[r, k]`` whose rows sum to 0."""
        each = torch.bmm(self.blocks, r.t().unsqueeze(2)).squeeze(2).t()
        if self.total is not None:
            common = torch.cholesky_solve(each.sum(1, keepdim=True), self.total)
            shared = torch.bmm(self.blocks, common.expand(len(self.blocks), -1, -1))
            each = each - shared.squeeze(2).t()
        return each


def conjugate_gradient(apply: Linear, precondition: Linear, b: Tensor) -> Tensor:
    v, r = torch.zeros_like(b), b
    z = precondition(r)
    p, rho = z, float((r * z).sum())
    end = 1e-16 * rho  # what is left is solved for again
    for _ in range(400):
        if not rho > end:
            break
        h = apply(p)
        step = rho / float((p * h).sum())
        v, r = v + step * p, r - step * h
        z = precondition(r)
        rho, before = float((r * z).sum()), rho
        p = z + (rho / before) * p
    return v


Query = Callable[[Array], Array]


class Truth(NamedTuple):
    """The query loss's derivatives."""

    features: Tensor  # [n, d] of the support features, without the column of a bias
    l2: float
    start: Tensor  # [d, k] of the anchor
    l2_scale: float  # ||v|| ||W - A||, or a thousandth of what W - A sums where that cancels
    rounding: float  # of the features' gradient where probabilities are rounded to float64
    weights: Array  # [d, k], the minimum
    doubt: float


def minimize(inner: Inner, basis: tuple[Tensor, Tensor]) -> tuple[Array, Curvature]:
    """The minimum by Newton with an exact line search, and the curvature there."""
    best, found, idle, w = np.inf, None, 0, inner.anchor
    for _ in range(100):
        p = inner.state(w)
        slope = inner.slope(w, p)
        size = float(np.sqrt((slope**2).sum()) / inner.l2)  # bounds the distance to the minimum
        curvature = Curvature(inner, basis, p)
        idle = 0 if size < 0.5 * best else idle + 1
        if size < best or found is None:
            best, found = size, (w, curvature)
        if size <= ROUNDING * float(np.sqrt((w**2).sum())) or (idle > 2 and near(found)):
            break
        direction = curvature.direction(-slope)
        w = w + best_step(inner, w, direction) * direction
    assert found is not None
    return found


def near(found: tuple[Array, Curvature]) -> bool:
    """Whether Newton's next step is one of rounding only."""
    w, curvature = found
    step = curvature.direction(curvature.inner.slope(w, curvature.p))
    return bool(np.abs(step).max() <= 1e-9 * np.abs(w).max())


def best_step(inner: Inner, w: Array, direction: Array) -> LONG:
    """Where the convex objective's slope along ``direction`` changes its sign; 1 near the end."""
    f, df = times(inner.x, w), times(inner.x, direction)
    pull = inner.l2 * ((w - inner.anchor) * direction).sum()
    push = inner.l2 * (direction**2).sum()

    def slope(t: LONG) -> LONG:
        return (inner.loss.slope(inner.loss.state(f + t * df)) * df).sum() + pull + t * push

    low, high = 0 * inner.l2, 0 * inner.l2 + 1
    if abs(slope(high)) <= 1e-2 * abs(slope(low)):
        return high
    while slope(high) < 0 and high < 1e15:
        low, high = high, 4 * high
    while low == 0 and high > 1e-30:
        low, high = (high / 4, high) if slope(high / 4) < 0 else (low, high / 4)
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return (low + high) / 2


class Solution(NamedTuple):
    """The minimum, the linear system's solution, and what the loss makes of both."""

    w: Array
    v: Array
    slope: Array  # of the loss in the logits at W, [n, k]
    curve: Array  # its second derivative there times X v, [n, k]

    def answer(self, inner: Inner, width: int) -> tuple[Array, LONG, Array]:
        """Minus the mixed derivatives times ``v``: in the features, in ``l2``, in the anchor."""
        features = times(self.slope, self.v.T) + times(self.curve, self.w.T)
        return -features[:, :width], -((self.w - inner.anchor) * self.v).sum(), inner.l2 * self.v


def of_weights(curvature: Curvature, w: Array, b: Array) -> Solution:
    """With the weights as unknowns."""
    inner, p = curvature.inner, curvature.p
    v = curvature.solve(b)
    return Solution(w, v, inner.loss.slope(p), inner.loss.curve(p, times(inner.x, v)))


def of_samples(curvature: Curvature, first: Solution, query: Query) -> Solution:
    """With one unknown a logit: ``W = A - X' slope / l2`` and ``v = (b - X' curve) / l2``."""
    inner, x = curvature.inner, curvature.inner.x

    def weights(slope: Array) -> Array:
        return inner.anchor - times(x.T, slope) / inner.l2

    def wrong_slope(slope: Array) -> Array:
        return slope - inner.loss.slope(inner.state(weights(slope)))

    slope = refine(curvature, wrong_slope, first.slope)
    w = weights(slope)
    b, p = query(w), inner.state(w)

    def solved(curve: Array) -> Array:
        return (b - times(x.T, curve)) / inner.l2

    def wrong_curve(curve: Array) -> Array:
        return curve - inner.loss.curve(p, times(x, solved(curve)))

    curve = refine(curvature, wrong_curve, first.curve)
    return Solution(w, solved(curve), slope, curve)


def refine(curvature: Curvature, wrong: Callable[[Array], Array], start: Array) -> Array:
    """Newton's on ``wrong(u) = 0``; ``(I + S X X' / l2)^-1 = I - S X H^-1 X'``."""
    x, loss = curvature.inner.x, curvature.inner.loss
    u, best, before = start, start, np.inf
    for _ in range(6):
        left = wrong(u)
        size = float(np.sqrt((left**2).sum()))
        if not size < before:
            break
        best, before = u, size
        back = times(x, curvature.solve(times(x.T, left)))
        u = u - left + loss.curve(curvature.p, back)
    return best


def distance(one: Array, other: Array) -> float:
    size = float(np.sqrt((other**2).sum()))
    gap = float(np.sqrt(((one - other) ** 2).sum()))
    return gap / size if size else float(gap > 0)


def span(x: Array) -> tuple[Tensor, Tensor]:
    """An orthonormal basis ``[d, r]`` of the samples' span, and their coordinates ``[n, r]``."""
    basis, coordinates = torch.linalg.qr(short(x).t())
    return basis, coordinates.t()


def hypergradient(inner: Inner, query: Query, width: int) -> tuple[Truth, Curvature]:
    """``query`` is the outer loss's gradient in ``W``; ``width`` the features without a bias."""
    w, curvature = minimize(inner, span(inner.x))
    first = of_weights(curvature, w, query(w))
    features, l2, start = first.answer(inner, width)
    moved = np.sqrt(((w - inner.anchor) ** 2).sum())
    summed = np.sqrt((inner.x**2).sum() * (first.slope**2).sum()) / inner.l2
    scale = np.sqrt((first.v**2).sum()) * max(moved, LONG(1e-3) * summed)
    again = of_samples(curvature, first, query).answer(inner, width)
    doubt = max(
        distance(again[0], features),
        float(abs(again[1] - l2) / scale) if scale else 0.0,
        distance(again[2], start),
    )
    sizes = inner.loss.c * np.sqrt(len(inner.x) * (first.v**2).sum())
    moving = float(np.finfo(np.float64).eps * sizes)
    size = float(np.sqrt((features**2).sum()))
    rounding = moving / size if size > 0 else float(moving > 0)
    parts = short(features), float(l2), short(start), float(scale), rounding
    return Truth(*parts, w, doubt), curvature


# Few-shot heads as data, ordinary and hostile ones.


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
    weights = {"zero features": 3, "all zero": 1, "one class": 3, "separable": 3,
               "copied samples": 3, "huge": 3, "contradiction": 2}  # fmt: skip
    chosen = draw.choices([*weights], [*weights.values()], k=draw.choice([0, 1, 1, 2]))
    return sorted(set(chosen))


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
    scale = max(truth.l2_scale, abs(truth.l2)) or float(truth.start.norm())  # zero: at the anchor
    gap = abs(l2 - truth.l2)
    return (
        distance(long(features), long(truth.features)),
        gap / scale if scale else float(gap > 0),
        0.0 if start is None else distance(long(start), long(truth.start)),
    )
