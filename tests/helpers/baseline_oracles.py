"""What the baselines are measured against, networks and updates as functions, nothing of ours; and
what their tests do with a learner.

Phi and theta are tuples of tensors; an update is ``(phi, gradient, state, lr, k) -> (phi, state)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad

Tensors = tuple[Tensor, ...]
Update = Callable[[Tensors, Tensors, Any, Any, int], tuple[Tensors, Any]]
Net = Callable[[Tensors, Tensor], Tensor]

LABELS, QUERY_LABELS = torch.arange(9) % 3, torch.arange(6) % 3


@dataclass
class Case:
    """A task: a module, the function it computes, and features of theta (none: the inputs)."""

    module: nn.Module
    net: Net
    theta: Tensors
    support: Tensor
    query: Tensor

    def embed(self, theta: Tensors, x: Tensor) -> Tensor:
        return torch.tanh(x @ theta[0]) if theta else x

    def inner(self, phi: Tensors, theta: Tensors) -> Tensor:
        return F.cross_entropy(self.net(phi, self.embed(theta, self.support)), LABELS)

    def outer(self, phi: Tensors, theta: Tensors) -> Tensor:
        return F.cross_entropy(self.net(phi, self.embed(theta, self.query)), QUERY_LABELS)

    def start(self) -> Tensors:
        return tuple(p.detach() for p in self.module.parameters())

    def constants(self) -> Tensors:
        return tuple(t.detach() for t in self.theta)

    def twin(self) -> Case:
        """The same task with tensors of its own."""
        theta = tuple(t.detach().clone().requires_grad_() for t in self.theta)
        return Case(copy.deepcopy(self.module), self.net, theta, self.support, self.query)


def linear(phi: Tensors, x: Tensor) -> Tensor:
    return x @ phi[0].t() + phi[1]


def two_layers(phi: Tensors, x: Tensor) -> Tensor:
    return linear(phi[2:], torch.tanh(linear(phi, x)))


def convolution(phi: Tensors, x: Tensor) -> Tensor:
    """Convolution, batch norm in training mode, softplus, a linear layer."""
    h = F.conv2d(x, phi[0], phi[1])
    mean = h.mean((0, 2, 3), keepdim=True)
    variance = (h - mean).square().mean((0, 2, 3), keepdim=True)
    h = (h - mean) / (variance + 1e-5).sqrt() * phi[2].view(1, -1, 1, 1) + phi[3].view(1, -1, 1, 1)
    return linear(phi[4:], F.softplus(h).flatten(1))


def make_case(name: str) -> Case:
    """A case by name: ``maml`` adapts the whole network, ``anil`` a head on features of theta."""
    torch.manual_seed(0)
    algorithm, network = name.split()
    shape = (2, 5, 5) if network == "cnn" else (4,)
    modules: dict[str, tuple[Callable[[], nn.Module], Net]] = {
        "linear": (lambda: nn.Linear(4, 3), linear),
        "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), two_layers),
        "cnn": (
            lambda: nn.Sequential(
                nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(27, 3)
            ),
            convolution,
        ),
    }
    make, net = modules[network]
    theta = (torch.randn(4, 4, requires_grad=True),) if algorithm == "anil" else ()
    return Case(make(), net, theta, torch.randn(9, *shape), torch.randn(6, *shape))


CASES = ["maml linear", "maml mlp", "maml cnn", "anil linear", "anil mlp"]


def sgd(phi: Tensors, g: Tensors, state: Any, lr: Any, k: int) -> tuple[Tensors, Any]:
    return tuple(p - lr * d for p, d in zip(phi, g, strict=True)), None


def momentum(phi: Tensors, g: Tensors, state: Any, lr: Any, k: int) -> tuple[Tensors, Any]:
    """SGD with momentum 0.9 and weight decay 0.1."""
    g = tuple(d + 0.1 * p for p, d in zip(phi, g, strict=True))
    buffer = g if state is None else tuple(0.9 * b + d for b, d in zip(state, g, strict=True))
    return tuple(p - lr * b for p, b in zip(phi, buffer, strict=True)), buffer


def adam(phi: Tensors, g: Tensors, state: Any, lr: Any, k: int) -> tuple[Tensors, Any]:
    """Kingma and Ba (2015), with the reordered last line of their section 2."""
    m, v = state or ((0.0,) * len(phi),) * 2
    m = tuple(0.9 * a + 0.1 * d for a, d in zip(m, g, strict=True))
    v = tuple(0.999 * a + 0.001 * d**2 for a, d in zip(v, g, strict=True))
    rate = lr * (1 - 0.999**k) ** 0.5 / (1 - 0.9**k)
    steps = [rate * a / (b.sqrt() + 1e-8) for a, b in zip(m, v, strict=True)]
    return tuple(p - s for p, s in zip(phi, steps, strict=True)), (m, v)


def rmsprop(phi: Tensors, g: Tensors, state: Any, lr: Any, k: int) -> tuple[Tensors, Any]:
    v = state or (0.0,) * len(phi)
    v = tuple(0.99 * a + 0.01 * d**2 for a, d in zip(v, g, strict=True))
    steps = [lr * d / (b.sqrt() + 1e-8) for d, b in zip(g, v, strict=True)]
    return tuple(p - s for p, s in zip(phi, steps, strict=True)), v


UPDATES = {"sgd": sgd, "momentum": momentum, "adam": adam, "rmsprop": rmsprop}


def path(
    case: Case, start: Tensors, theta: Tensors, lr: Any, steps: int, update: Update = sgd
) -> list[Tensors]:
    """Phi before the first inner step and after each."""
    phi, state = [start], None
    for k in range(1, steps + 1):
        new, state = update(phi[-1], grad(case.inner)(phi[-1], theta), state, lr, k)
        phi.append(new)
    return phi


def query_loss_after(
    case: Case, start: Tensors, theta: Tensors, lr: Any, steps: int, update: Update = sgd
) -> Tensor:
    return case.outer(path(case, start, theta, lr, steps, update)[-1], theta)


def unrolled(
    case: Case, lr: float, steps: int, update: Update = sgd
) -> tuple[Tensors, Tensors, Tensor]:
    """The query loss's derivatives in the initial value, theta and lr, along the whole path."""
    derivative = grad(query_loss_after, argnums=(1, 2, 3))
    return derivative(case, case.start(), case.constants(), torch.tensor(lr), steps, update)


def first_order(case: Case, lr: float, steps: int, update: Update = sgd) -> tuple[Tensors, Tensors]:
    """The query loss's plain gradients in phi and theta at the adapted point."""
    phi = path(case, case.start(), case.constants(), lr, steps, update)[-1]
    return grad(case.outer, argnums=(0, 1))(phi, case.constants())


def support_loss(learner: Any, case: Case, cached: bool = True) -> Callable[[], Tensor]:
    """The inner loss as a closure, on features computed once or at each call."""
    h = case.embed(case.theta, case.support) if cached else None

    def loss() -> Tensor:
        x = case.embed(case.theta, case.support) if h is None else h
        return F.cross_entropy(learner(x), LABELS)

    return loss


def query_loss(learner: Any, case: Case) -> Tensor:
    return F.cross_entropy(learner(case.embed(case.theta, case.query)), QUERY_LABELS)


def outer_step(parent: Any, case: Case, steps: int, cached: bool = True) -> Any:
    """Adapt a clone by a closure and back-propagate the query loss; the clone."""
    learner = parent.clone()
    learner.adapt(support_loss(learner, case, cached), steps=steps)
    query_loss(learner, case).backward()
    return learner


def gradients(case: Case, *more: Tensor) -> list[Tensor]:
    """What the backward pass left on the initial value, theta and ``more``; zeros for nothing."""
    leaves = [*case.module.parameters(), *case.theta, *more]
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
