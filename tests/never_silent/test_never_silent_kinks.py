"""Inner minima on a kink, where the objective has no second derivative.

The truth is the outer loss's slope along one direction, by differences of minima of the same
problem with its kinks rounded within a vanishing width. Networks have several minima: the one that
counts is the one next to where the learner ended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit_from, linear, network, slope_along
from small_task import adapt
from torch import Tensor, nn
from verdict import judge, must_be_right

from l2l_implicit import (
    LBFGS,
    Direct,
    GradientDescent,
    Hessian,
    ImplicitCGHead,
    ImplicitMAML,
    Newton,
)

D = torch.float64
SLACK = 0.05  # of the differences, and of the rounded kinks
NARROW = (1e-3, 3e-4)
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "Newton": ({"inner": Newton()}, 100),
    "LBFGS": ({"inner": LBFGS()}, 100),
    "gradient descent": ({"inner": GradientDescent()}, 400),
    "Newton, direct": ({"inner": Newton(), "linear": Direct()}, 100),
}

# Networks. Each bend as torch has it and rounded within a width; the layer is anchored at its
# initial value, whose derivative is asked.


def soft_relu(z: Tensor, width: float) -> Tensor:
    return width * F.softplus(z / width, threshold=40)


BENDS: dict[str, tuple[nn.Module, Callable[[Tensor, float], Tensor]]] = {
    "relu": (nn.ReLU(), soft_relu),
    "leaky relu": (nn.LeakyReLU(0.1), lambda z, w: 0.1 * z + 0.9 * soft_relu(z, w)),
    "hardtanh": (nn.Hardtanh(), lambda z, w: soft_relu(z + 1, w) - soft_relu(z - 1, w) - 1),
    "none": (nn.Tanh(), lambda z, w: torch.tanh(z)),
    "soft shrinkage": (
        nn.Softshrink(0.3),
        lambda z, w: soft_relu(z - 0.3, w) - soft_relu(-z - 0.3, w),
    ),
}


class TwoLayers:
    """Twelve samples, five features, four hidden units, three classes."""

    def __init__(self, bend: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.bend, self.rounded = BENDS[bend]
        self.net = nn.Sequential(nn.Linear(5, 4), self.bend, nn.Linear(4, 3)).double()
        self.x, self.query = torch.randn(12, 5, dtype=D), torch.randn(12, 5, dtype=D)
        self.y, self.l2 = torch.arange(12) % 3, 0.7
        self.start = flat(self.net.parameters())
        self.direction = F.normalize(torch.randn(len(self.start), dtype=D), dim=0)
        self.end = self.start

    def slope(self, how: str, settings: dict[str, Any], steps: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            self.net.zero_grad()
            exact = {"curvature": Hessian(), **settings}
            learner = ImplicitMAML(self.net, lr=0.1, l2=self.l2, **exact).clone()
            adapt(learner, lambda: F.cross_entropy(learner(self.x), self.y), how, steps)
            self.end = flat(learner.module.parameters())
            F.cross_entropy(learner(self.query), self.y).backward()
            found = flat(p.grad for p in self.net.parameters())
            return (found @ self.direction).reshape(1)

        return call

    def inner(self, phi: Tensor, anchor: Tensor, width: float) -> Tensor:
        out = network(phi, self.x, 4, 3, lambda z: self.rounded(z, width))
        return F.cross_entropy(out, self.y) + self.l2 / 2 * (phi - anchor).square().sum()

    def outer(self, phi: Tensor, anchor: Tensor, width: float) -> Tensor:
        out = network(phi, self.query, 4, 3, lambda z: self.rounded(z, width))
        return F.cross_entropy(out, self.y)

    def truth(self) -> Tensor:
        return slope_along(self.inner, self.outer, self.end, self.start, self.direction, NARROW)


@pytest.mark.parametrize("bend", [bend for bend in BENDS if bend != "none"])
@pytest.mark.parametrize("way", WAYS)
def test_networks_with_kinks(bend: str, way: str) -> None:
    for seed in range(5 if bend == "relu" else 2):
        task = TwoLayers(bend, seed)
        judge(task.slope("closure", *WAYS[way]), task.truth, SLACK)
    judge(task.slope("losses", WAYS[way][0], 20), task.truth, SLACK)


def test_a_network_without_a_kink_is_right() -> None:
    task = TwoLayers("none", 0)
    full = implicit_from(
        lambda p, t: task.inner(p, t, 1.0), lambda p, t: task.outer(p, t, 1.0),
        task.start, task.start,
    )  # fmt: skip
    right = (full @ task.direction).reshape(1)
    must_be_right(task.slope("closure", {"inner": Newton()}, 100), right)


# Losses of a linear head: theta is a linear map that makes its features.


def soft_absolute(z: Tensor, width: float) -> Tensor:
    return (z.square() + width**2).sqrt()


def margins(out: Tensor) -> Tensor:
    """How much each other class is short of a distance of 1 from the right one, ``[n, k - 1]``."""
    n, k = out.shape
    y = torch.arange(n) % k
    others = torch.stack([(y + i) % k for i in range(1, k)], dim=1)
    return 1 - out[torch.arange(n), y].unsqueeze(1) + out.gather(1, others)


Loss = Callable[[Tensor, Tensor], Tensor]
Rounded = Callable[[Tensor, Tensor, float], Tensor]
LOSSES: dict[str, tuple[Loss, Rounded]] = {
    "absolute error": (
        lambda out, y: F.l1_loss(out, y),
        lambda out, y, w: soft_absolute(out - y, w).mean(),
    ),
    "narrow smooth l1": (
        lambda out, y: F.smooth_l1_loss(out, y, beta=1e-6),
        lambda out, y, w: soft_absolute(out - y, w).mean(),
    ),
    "quantile": (
        lambda out, y: torch.maximum(0.8 * (y - out), -0.2 * (y - out)).mean(),
        lambda out, y, w: (soft_relu(y - out, w) - 0.2 * (y - out)).mean(),
    ),
    "hinge": (
        lambda out, y: margins(out).clamp_min(0).mean(),
        lambda out, y, w: soft_relu(margins(out), w).mean(),
    ),
    "largest margin": (
        lambda out, y: margins(out).clamp_min(0).amax(1).mean(),
        lambda out, y, w: (w * torch.logsumexp(
            F.pad(margins(out), (0, 1)) / w, dim=1)).mean(),
    ),
}  # fmt: skip


class Features:
    """Thirty samples; ``theta`` ``[5, 3]`` maps five numbers to three features."""

    def __init__(self, loss: str, seed: int, l2: float = 0.02) -> None:
        torch.manual_seed(seed)
        (self.loss, self.rounded), self.l2 = LOSSES[loss], l2
        self.x, self.query = torch.randn(30, 5, dtype=D), torch.randn(30, 5, dtype=D)
        self.y = self.x[:, :3] + torch.randn(30, 3, dtype=D).pow(3)
        self.theta = 0.4 * torch.randn(5, 3, dtype=D)
        self.direction = F.normalize(torch.randn(15, dtype=D), dim=0)

    def slope(
        self, settings: dict[str, Any], steps: int, loss: Loss | None = None
    ) -> Callable[[], Tensor]:
        def call() -> Tensor:
            theta = self.theta.clone().requires_grad_()
            learner = ImplicitCGHead(nn.Linear(3, 3).double(), 0.1, l2=self.l2, **settings).clone()
            inner = loss or self.loss
            learner.adapt(lambda: inner(learner(torch.tanh(self.x @ theta)), self.y), steps=steps)
            F.mse_loss(learner(torch.tanh(self.query @ theta)), self.query[:, :3]).backward()
            return (theta.grad.reshape(-1) @ self.direction).reshape(1)

        return call

    def inner(self, phi: Tensor, theta: Tensor, width: float) -> Tensor:
        out = linear(phi, torch.tanh(self.x @ theta.view(5, 3)), 3)
        return self.rounded(out, self.y, width) + self.l2 / 2 * phi.square().sum()

    def outer(self, phi: Tensor, theta: Tensor, width: float) -> Tensor:
        out = linear(phi, torch.tanh(self.query @ theta.view(5, 3)), 3)
        return F.mse_loss(out, self.query[:, :3])

    def truth(self) -> Tensor:
        start, theta = torch.zeros(12, dtype=D), self.theta.reshape(-1)
        return slope_along(self.inner, self.outer, start, theta, self.direction)


@cache
def truth_of_loss(loss: str, seed: int) -> Tensor:
    return Features(loss, seed).truth()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_with_kinks(loss: str, way: str, seed: int) -> None:
    task = Features(loss, seed)
    judge(task.slope(*WAYS[way]), lambda: truth_of_loss(loss, seed), SLACK)


@pytest.mark.parametrize("loss", ["absolute error", "hinge"])
def test_losses_with_kinks_rounded_widely_are_right(loss: str) -> None:
    task = Features(loss, 0, l2=0.1)

    def rounded(out: Tensor, y: Tensor) -> Tensor:
        return task.rounded(out, y, 0.5)

    full = implicit_from(
        lambda p, t: task.inner(p, t, 0.5), lambda p, t: task.outer(p, t, 0.5),
        torch.zeros(12, dtype=D), task.theta.reshape(-1),
    )  # fmt: skip
    right = (full @ task.direction).reshape(1)
    must_be_right(task.slope({}, 100, rounded), right)


# A maximum over two units that are tied at the minimum.


class Pooled(nn.Module):
    """The larger of two linear maps, as maxout and max pooling have it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 3).double(), nn.Linear(4, 3).double(), how

    def forward(self, x: Tensor) -> Tensor:
        pair = torch.stack([self.a(x), self.b(x)], dim=-1)
        if self.how == "pool":
            return F.max_pool1d(pair, 2).squeeze(-1)
        return pair.amax(-1) if self.how == "amax" else torch.maximum(pair[..., 0], pair[..., 1])


@pytest.mark.parametrize("how", ["pool", "amax", "maximum"])
@pytest.mark.parametrize("way", WAYS)
def test_maxima_at_ties(how: str, way: str) -> None:
    """The squared error draws some of the two maps' outputs together."""
    torch.manual_seed(2)
    net = Pooled(how)
    x, query = torch.randn(9, 4, dtype=D), torch.randn(9, 4, dtype=D)
    y = torch.minimum(x[:, :3], -x[:, 1:]) - 1  # concave: no maximum of linear maps comes near
    theta, l2 = flat(net.parameters()), 0.05
    direction = F.normalize(torch.randn(30, dtype=D), dim=0)
    (settings, steps), ends = WAYS[way], []

    def gradient() -> Tensor:
        net.zero_grad()
        learner = ImplicitMAML(net, lr=0.1, l2=l2, curvature=Hessian(), **settings).clone()
        learner.adapt(lambda: F.mse_loss(learner(x), y), steps=steps)
        ends.append(flat(learner.module.parameters()))
        F.mse_loss(learner(query), query[:, :3]).backward()
        return (flat(p.grad for p in net.parameters()) @ direction).reshape(1)

    def out(phi: Tensor, x: Tensor, width: float) -> Tensor:
        pair = torch.stack([linear(phi[:15], x, 3), linear(phi[15:], x, 3)], dim=-1)
        return width * torch.logsumexp(pair / width, dim=-1)

    def truth() -> Tensor:
        return slope_along(
            lambda p, t, w: F.mse_loss(out(p, x, w), y) + l2 / 2 * (p - t).square().sum(),
            lambda p, t, w: F.mse_loss(out(p, query, w), query[:, :3]),
            ends[-1], theta, direction, NARROW,
        )  # fmt: skip

    judge(gradient, truth, SLACK)
