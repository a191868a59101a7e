"""Networks whose second derivative autograd does not have, or has wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import implicit_from, linear, response
from small_task import adapt
from torch import Tensor, nn
from torch.autograd.function import Function as Operation
from torch.autograd.function import once_differentiable
from torch.func import grad
from two_layers import (
    FIRST,
    HIDDEN,
    L2,
    QUERY,
    SIZES,
    START,
    WAYS,
    D,
    Forward,
    Net,
    U,
    V,
    X,
    Y,
    net_of,
    on_start,
    through,
    truth,
)
from verdict import Heard, judge, must_be_right

from l2l_implicit import GradientDescent, ImplicitCGHead, Newton


class Tanh(Operation):
    """Saves what it returns; its subclasses forget parts of the derivative of the derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors  # made inside forward: no graph
        return gradient * (1 - y * y)


class Once(Tanh):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].square())


class WithoutGraph(Tanh):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        with torch.no_grad():
            return gradient * (1 - ctx.saved_tensors[0].square())


class ByNumpy(Tanh):
    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        y = ctx.saved_tensors[0].detach().numpy()
        return torch.from_numpy(gradient.detach().numpy() * (1 - y * y))


class Halved(Tanh):
    """Its second derivative is half of what it is."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - (0.5 * y + 0.5 * y.detach()).square())

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y


class Scaled(Operation):
    """The identity with a smaller gradient: whole, but of no objective."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 0.3 * gradient


@pytest.mark.parametrize("way", WAYS)
def test_plain_networks_are_right(way: str) -> None:
    must_be_right(on_start(net_of, way, F.cross_entropy), truth())


OPERATIONS = {kind.__name__: kind.apply for kind in (Tanh, Once, WithoutGraph, ByNumpy, Halved)}


ALONG_THE_STEPS = pytest.mark.xfail(
    strict=True, reason="loss tensors are compared along the steps alone; 5 % are missing here"
)
HALVED = "Halved", "Newton, losses"  # 10 % are missing, in long steps


@pytest.mark.parametrize("name, way", [
    *(pair for pair in itertools.product(OPERATIONS, WAYS) if pair != HALVED),
    pytest.param(*HALVED, marks=ALONG_THE_STEPS),
])  # fmt: skip
def test_operations(name: str, way: str) -> None:
    judge(on_start(lambda: net_of(bend=OPERATIONS[name]), way, F.cross_entropy), truth())


@pytest.mark.parametrize("how", ["loss", "closure"])
@pytest.mark.parametrize("inner", [Newton(), GradientDescent(), GradientDescent(adaptive=True)])
@pytest.mark.parametrize("lr", [0.03, 1.0])
@pytest.mark.parametrize("bend", [torch.tanh, torch.sigmoid, F.softplus, torch.sin])
def test_a_right_second_derivative_is_never_doubted(
    bend: Callable[[Tensor], Tensor], lr: float, inner: Any, how: str
) -> None:
    """And so of no problem of `problems.py` (core/test_hypergradient.py); solved or not."""

    def adapted(seed: int) -> None:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3)).double()
        learner = ImplicitCGHead(net, lr, anchor="init", inner=inner).clone()
        hidden, last = learner.module
        adapt(learner, lambda: F.cross_entropy(last(bend(hidden(X))), Y), how, 20)

    for seed in range(3):
        heard = Heard(lambda seed=seed: adapted(seed))
        assert heard.error is None and not any("second derivative" in w for w in heard.warned)


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_of_no_objective(way: str) -> None:
    """As gradient reversal and straight-through layers have it; the Jacobian is not symmetric."""
    scale = torch.ones_like(START)
    scale[: SIZES[0]] = scale[-HIDDEN:] = 0.3
    net = on_start(
        lambda: net_of(bend=lambda z: torch.tanh(Scaled.apply(z))), way, F.cross_entropy
    )
    judge(net, truth(scale=scale))


# Normalised weights.


def spectral(phi: Tensor, frozen: Tensor, x: Tensor) -> Tensor:
    w = phi[: SIZES[0]].view(HIDDEN, 5)
    return through(w / torch.linalg.matrix_norm(w, 2), phi, x)


def frozen_norm(phi: Tensor, frozen: Tensor, x: Tensor) -> Tensor:
    w, constant = (part[: SIZES[0]].view(HIDDEN, 5) for part in (phi, frozen))
    return through(2 * w / constant.norm(), phi, x)


def length_and_direction(phi: Tensor, frozen: Tensor, x: Tensor) -> Tensor:
    """Weight normalisation: first the lengths, then the directions."""
    g, v = phi[:HIDDEN].view(-1, 1), phi[HIDDEN : HIDDEN + SIZES[0]].view(HIDDEN, 5)
    return through(g * v / v.norm(dim=1, keepdim=True), phi, x)


class FrozenNorm(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.weight / self.weight.detach().norm(), self.bias)


def layer(kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    made = kind(5, HIDDEN).double()
    made.load_state_dict(FIRST.state_dict())
    return made


NORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], type[nn.Linear], Forward]] = {
    "spectral norm": (nn.utils.parametrizations.spectral_norm, nn.Linear, spectral),
    "old spectral norm": (nn.utils.spectral_norm, nn.Linear, spectral),
    "weight norm": (nn.utils.parametrizations.weight_norm, nn.Linear, length_and_direction),
    "old weight norm": (nn.utils.weight_norm, nn.Linear, length_and_direction),
    "norm taken for a constant": (lambda made: made, FrozenNorm, frozen_norm),
}


UNSEEN = "norm taken for a constant", "gradient descent"
SEEN = [pair for pair in itertools.product(NORMS, WAYS) if pair != UNSEEN]


@pytest.mark.parametrize("name, way", [*SEEN, pytest.param(*UNSEEN, marks=ALONG_THE_STEPS)])
def test_normalised_weights(name: str, way: str) -> None:
    norm, kind, forward = NORMS[name]

    def made() -> Net:
        net = net_of(norm(layer(kind)))
        for _ in range(30):  # the power iteration of a layer in use has converged
            net(X)
        return net

    start = None
    if "weight norm" in name:
        lengths = FIRST.weight.detach().norm(dim=1)
        start = torch.cat([lengths, START])
    judge(on_start(made, way, F.cross_entropy), truth(forward, start=start))


@pytest.mark.parametrize("norm", ["spectral norm", "weight norm"])
def test_normalised_weights_beside_the_learner_are_right(norm: str) -> None:
    """In the backbone only first derivatives are needed."""
    backbone = NORMS[norm][0](layer())
    backbone.eval()
    head, l2 = nn.Linear(HIDDEN, 3).double(), 0.3
    features = torch.tanh(backbone(X)).detach()

    def gradient() -> Tensor:
        h = torch.tanh(backbone(X))
        h.retain_grad()
        learner = ImplicitCGHead(head, 0.1, l2=l2).clone()
        learner.adapt(lambda: F.cross_entropy(learner(h), Y), steps=20)
        F.cross_entropy(learner(features), Y.roll(1)).backward()
        return h.grad

    def inner(phi: Tensor, h: Tensor) -> Tensor:
        return F.cross_entropy(linear(phi, h.view(12, -1), 3), Y) + l2 / 2 * phi.square().sum()

    def outer(phi: Tensor, h: Tensor) -> Tensor:
        return F.cross_entropy(linear(phi, features, 3), Y.roll(1))

    right = implicit_from(inner, outer, torch.zeros(15, dtype=D), features.reshape(-1))
    must_be_right(gradient, right.view(12, HIDDEN))


@pytest.mark.parametrize("name", ["spectral norm", "old spectral norm"])
def test_spectral_norm_in_evaluation_mode_is_right(name: str) -> None:
    """Its vectors are constants there, and the network is smooth."""
    norm = NORMS[name][0]

    def made() -> Net:
        net = net_of(norm(layer()))
        for _ in range(30):
            net(X)
        return net.eval()  # type: ignore[return-value]

    u, v = U[:, 0], V[0]

    def constant(phi: Tensor, frozen: Tensor, x: Tensor) -> Tensor:
        w = phi[: SIZES[0]].view(HIDDEN, 5)
        return through(w / (u @ w @ v), phi, x)

    must_be_right(on_start(made, "Newton", F.cross_entropy), truth(constant))


# Operations of torch's own without a second derivative: right, or a word of the library's.


class Distances(nn.Module):
    """Distances to prototypes, which are the parameters."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.last = nn.Linear(5, 3, bias=False).double()
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        if self.written_out:
            return -(x.unsqueeze(1) - self.last.weight).square().sum(2).sqrt()
        return -torch.cdist(x, self.last.weight)


@pytest.mark.parametrize("way", WAYS)
def test_distances(way: str) -> None:
    def response_of(written: bool) -> Callable[[], Tensor]:
        return on_start(lambda: Distances(written), way, F.cross_entropy)

    theta = Distances(True).last.weight.detach().reshape(-1)

    def out(phi: Tensor, x: Tensor) -> Tensor:
        return -(x.unsqueeze(1) - phi.view(3, 5)).square().sum(2).sqrt()

    right = response(
        grad(lambda p, t: F.cross_entropy(out(p, X), Y) + L2 / 2 * (p - t).square().sum()),
        lambda p, t: F.cross_entropy(out(p, QUERY), Y), theta, theta,
    )  # fmt: skip
    must_be_right(response_of(True), right)
    judge(response_of(False), right)
