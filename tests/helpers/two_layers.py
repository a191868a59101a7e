"""A network of two layers, its gradient in the initial value, and what that should be; and the same
data for a linear head and a network whose objective is also a function of one vector.

The truth is the response of the point where the inner solvers' own gradient vanishes; that
gradient is written out in plain operations, as a field.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from oracles import flat, linear, network, response
from small_task import adapt
from torch import Tensor, nn
from torch.func import grad

from l2l_implicit import LBFGS, Direct, GradientDescent, ImplicitMAML, Newton

D = torch.float64
L2, HIDDEN = 0.5, 4
WAYS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "Newton": ("closure", 50, {"inner": Newton()}),
    "Newton, losses": ("losses", 12, {"inner": Newton(), "linear": Direct()}),
    "LBFGS": ("closure", 80, {"inner": LBFGS()}),
    "gradient descent": ("losses", 250, {"inner": GradientDescent()}),
}


class Net(nn.Module):
    """Two layers; ``first`` may be any module from five to four numbers."""

    def __init__(self, first: nn.Module, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.bend = first, nn.Linear(HIDDEN, 3).double(), bend

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.last(self.bend(self.first(x)))


torch.manual_seed(0)
X, QUERY, Y = torch.randn(12, 5, dtype=D), torch.randn(12, 5, dtype=D), torch.arange(12) % 3
FIRST, LAST = nn.Linear(5, HIDDEN).double(), nn.Linear(HIDDEN, 3).double()
U, _, V = torch.linalg.svd(FIRST.weight.detach(), full_matrices=False)
SINGULAR = torch.tensor([1.6, 1.0, 0.6, 0.3], dtype=D)  # the first stays the largest
FIRST.weight.data = U @ torch.diag(SINGULAR) @ V
START = flat([FIRST.weight, *LAST.parameters(), FIRST.bias])
SIZES = [5 * HIDDEN, 3 * HIDDEN, 3, HIDDEN]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(phi, frozen, x) -> logits``: ``frozen`` is phi, taken for a constant."""


def net_of(first: nn.Module | None = None, bend: Callable[[Tensor], Tensor] = torch.tanh) -> Net:
    layer = nn.Linear(5, HIDDEN).double()
    layer.load_state_dict(FIRST.state_dict())
    net = Net(layer if first is None else first, bend)
    net.last.load_state_dict(LAST.state_dict())
    return net


def on_start(
    make: Callable[[], nn.Module], way: str, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[], Tensor]:
    """The gradient in the initial value, the first layer's bias last."""
    how, steps, settings = WAYS[way]

    def call() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of old weight_norm
            net = make()
        learner = ImplicitMAML(net, lr=0.1, l2=L2, **settings).clone()
        adapt(learner, lambda: loss(learner(X), Y), how, steps)
        F.cross_entropy(learner(QUERY), Y).backward()
        return flat(in_order([p.grad for p in net.parameters()], net))

    return call


def in_order(values: list[Tensor], net: nn.Module) -> list[Tensor]:
    """As the oracles have them, whatever a normalisation has renamed."""
    names = [name for name, _ in net.named_parameters()]
    bias = [value for name, value in zip(names, values, strict=True) if name == "first.bias"]
    return [v for n, v in zip(names, values, strict=True) if n != "first.bias"] + bias


def logits(phi: Tensor, frozen: Tensor, x: Tensor) -> Tensor:
    return through(phi[: SIZES[0]].view(HIDDEN, 5), phi, x)


def through(weight: Tensor, phi: Tensor, x: Tensor) -> Tensor:
    """The network whose first weight is this one; ``phi`` ends with the other three parts."""
    w, c, bias = phi[-sum(SIZES[1:]) :].split(SIZES[1:])
    return 2 * F.linear(torch.tanh(F.linear(x, weight, bias)), w.view(3, HIDDEN), c)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(logits, frozen logits, labels) -> scalar``."""


def entropy(out: Tensor, frozen: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out, y)


@cache
def truth(
    forward: Forward = logits, loss: Loss = entropy, start: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> Tensor:
    """``scale`` is what the loss's gradient is multiplied by on its way."""
    theta = START if start is None else start

    def of_loss(phi: Tensor, frozen: Tensor) -> Tensor:
        return loss(forward(phi, frozen, X), forward(frozen, frozen, X), Y)

    def field(phi: Tensor, anchor: Tensor) -> Tensor:
        return scale * grad(of_loss, argnums=0)(phi, phi) + L2 * (phi - anchor)

    def outer(phi: Tensor, anchor: Tensor) -> Tensor:
        return F.cross_entropy(forward(phi, phi, QUERY), Y)

    return response(field, outer, theta, theta)


# Heads as functions of one vector.

LR = 0.1
NETS: dict[str, nn.Module] = {
    "linear": nn.Linear(5, 3).double(),
    "two layers": nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double(),
}


def forward(name: str, phi: Tensor, x: Tensor) -> Tensor:
    return linear(phi, x, 3) if name == "linear" else network(phi, x, 4, 3, torch.tanh)


def start_of(name: str) -> Tensor:
    return flat(NETS[name].parameters())


def outer(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The query loss, for the oracles."""
    return lambda phi, theta: F.cross_entropy(forward(name, phi, QUERY), Y)


def fit(learner: Any, how: str, steps: int = 1) -> None:
    adapt(learner, lambda: F.cross_entropy(learner(X), Y), how, steps)
