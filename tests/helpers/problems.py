"""Meta-learning problems as data: each says how its two losses are computed from a network.

A loss is written once, for any callable ``net``: the learner under test, or a pure function of
phi for the oracles.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from oracles import flat, implicit, minimize, polish, relative_error
from small_task import adapt as take_steps
from torch import Tensor, nn
from torch.func import functional_call

from l2l_implicit import CG, ImplicitCGHead, Newton

Net = Callable[[Tensor], Tensor]
Theta = dict[str, Tensor]
Loss = Callable[[Net, Theta, tuple[Tensor, Tensor]], Tensor]

SUPPORT, QUERY, RAW, WIDTH, CLASSES, SEED = 12, 9, 5, 4, 3, 3


@dataclass
class Problem:
    """One task. ``theta`` are leaves; ``embed`` gives support and query inputs of the network."""

    name: str
    head: nn.Module
    theta: Theta
    embed: Callable[[Theta], tuple[Tensor, Tensor]]
    support: Loss
    query: Loss
    anchor: str = "zero"
    l2: float = 0.3
    lr: float = 1.0

    def l2_of(self, theta: Theta) -> float | Tensor:
        return theta.get("l2", self.l2)

    def leaves(self) -> list[Tensor]:
        """Everything the outer gradient is taken of: theta, then the head's initial values."""
        return [*self.theta.values(), *self.head.parameters()]

    def start(self) -> Tensor:
        return flat(self.head.parameters())

    def inner(self, phi: Tensor, *leaves: Tensor) -> Tensor:
        """The regularised support loss as a pure function, for the oracles."""
        theta, initial = self._named(leaves)
        center = torch.cat([p.reshape(-1) for p in initial]) if self.anchor == "init" else 0.0
        regularizer = 0.5 * self.l2_of(theta) * (phi - center).square().sum()
        return self.support(self._net(phi), theta, self.embed(theta)) + regularizer

    def outer(self, phi: Tensor, *leaves: Tensor) -> Tensor:
        """The query loss as a pure function."""
        theta, _ = self._named(leaves)
        return self.query(self._net(phi), theta, self.embed(theta))

    def _named(self, leaves: tuple[Tensor, ...]) -> tuple[Theta, list[Tensor]]:
        theta = dict(zip(self.theta, leaves, strict=False))
        initial = list(leaves[len(self.theta) :])
        theta["initial"] = initial[0]
        return theta, initial

    def _net(self, phi: Tensor) -> Net:
        return on_vector(self.head, phi)


def on_vector(module: nn.Module, phi: Tensor) -> Callable[..., Any]:
    """What the module computes where its parameters, in their order, are the vector ``phi``."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    pieces = phi.split([shape.numel() for shape in shapes.values()])
    named = {k: p.view(s) for (k, s), p in zip(shapes.items(), pieces, strict=True)}
    return lambda *args, **kwargs: functional_call(module, named, args, kwargs)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def linear(out: int, bias: bool = True, width: int = WIDTH) -> nn.Module:
    return nn.Linear(width, out, bias=bias, dtype=torch.float64)


def two_layers(hidden: int = 6, spread: float = 1.0) -> nn.Module:
    head = nn.Sequential(linear(hidden), nn.Tanh(), linear(CLASSES, width=hidden))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(spread)
    return head


def _constants(width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (SUPPORT, width), (QUERY, width)
    support, query = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in sizes)
    return support, query


INPUTS, TARGETS = _constants(RAW, seed=1), _constants(CLASSES, seed=2)
LABELS, QUERY_LABELS = torch.arange(SUPPORT) % CLASSES, torch.arange(QUERY) % CLASSES


def backbone(theta: Theta) -> tuple[Tensor, Tensor]:
    support, query = INPUTS
    return torch.tanh(support @ theta["backbone"]), torch.tanh(query @ theta["backbone"])


def raw(theta: Theta) -> tuple[Tensor, Tensor]:
    support, query = INPUTS
    return support[:, :WIDTH], query[:, :WIDTH]


def cross_entropy(reduction: str) -> Loss:
    return lambda net, theta, h: F.cross_entropy(net(h[0]), LABELS, reduction=reduction)


def query_cross_entropy(net: Net, theta: Theta, h: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(h[1]), QUERY_LABELS)


def squared(reduction: str) -> Loss:
    return lambda net, theta, h: F.mse_loss(net(h[0]), TARGETS[0], reduction=reduction)


def query_squared(net: Net, theta: Theta, h: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(net(h[1]), TARGETS[1])


def leaf_twice(net: Net, theta: Theta, h: tuple[Tensor, Tensor]) -> Tensor:
    """The backbone's weight also enters directly, times the outputs: both ways must count once."""
    direct = (net(h[0]).square().mean(0) * theta["backbone"].square().sum()).sum()
    return F.cross_entropy(net(h[0]), LABELS) + 0.02 * direct


def parents_weight(net: Net, theta: Theta, h: tuple[Tensor, Tensor]) -> Tensor:
    """The parent's own weight as a teacher of its clone."""
    return F.cross_entropy(net(h[0]), LABELS) + 0.2 * F.mse_loss(
        net(h[0]), h[0] @ theta["initial"].t()
    )


def features_of_parent(theta: Theta) -> tuple[Tensor, Tensor]:
    """Features made by the very parameters that are then cloned and adapted."""
    support, query = backbone(theta)
    return torch.tanh(support @ theta["initial"].t()), torch.tanh(query @ theta["initial"].t())


def query_own_output(net: Net, theta: Theta, h: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(net(h[1])), torch.arange(QUERY) % WIDTH)


def make_problems() -> dict[str, Problem]:
    """Every problem, freshly drawn from one seed; a new one goes to the end, or others change."""
    torch.manual_seed(SEED)
    ce, query_ce = cross_entropy("mean"), query_cross_entropy

    def theta(**more: Tensor) -> Theta:
        return {"backbone": leaf(RAW, WIDTH), **more}

    found = [
        Problem("ridge mean", linear(3), theta(), backbone, squared("mean"), query_squared),
        Problem("ridge sum", linear(3, False), theta(l2=scalar(2.0)), backbone, squared("sum"),
                query_squared, lr=0.04),
        Problem("softmax mean bias", linear(3), theta(l2=scalar(0.3)), backbone, ce, query_ce),
        Problem("softmax mean", linear(3, False), theta(), backbone, ce, query_ce),
        Problem("softmax sum bias", linear(3), theta(), backbone, cross_entropy("sum"), query_ce,
                l2=0.7, lr=0.25),
        Problem("softmax sum", linear(3, False), theta(l2=scalar(0.4)), backbone,
                cross_entropy("sum"), query_ce, lr=0.3),
        Problem("logistic", linear(2), theta(), backbone,
                lambda net, t, h: F.cross_entropy(net(h[0]), LABELS % 2),
                lambda net, t, h: F.cross_entropy(net(h[1]), QUERY_LABELS % 2)),
        Problem("binary logits", linear(1), theta(), backbone,
                lambda net, t, h: F.binary_cross_entropy_with_logits(
                    net(h[0])[:, 0], (LABELS % 2).double()),
                lambda net, t, h: F.binary_cross_entropy_with_logits(
                    net(h[1])[:, 0], (QUERY_LABELS % 2).double())),
        Problem("scaled features", linear(3), theta(scale=scalar(1.3)),
                lambda t: tuple(t["scale"] * h for h in backbone(t)), ce, query_ce),
        Problem("scaled logits", linear(3), theta(scale=scalar(1.4)), backbone,
                lambda net, t, h: F.cross_entropy(t["scale"] * net(h[0]), LABELS),
                lambda net, t, h: F.cross_entropy(t["scale"] * net(h[1]), QUERY_LABELS)),
        Problem("anchored softmax", linear(3), theta(l2=scalar(0.3)), backbone, ce, query_ce,
                anchor="init"),
        Problem("two layers", two_layers(2, 2.0), theta(), backbone, cross_entropy("sum"),
                query_ce, l2=0.6, lr=0.15),
        Problem("two layers anchored", two_layers(), theta(l2=scalar(0.3)), backbone, ce, query_ce,
                anchor="init"),
        Problem("whole network", two_layers(), {"l2": scalar(0.5)}, raw, ce, query_ce,
                anchor="init"),
        # Known to the loss alone.
        Problem("module beside", linear(3), theta(beside=leaf(RAW, 3)), backbone,
                lambda net, t, h: F.mse_loss(net(h[0]), torch.tanh(INPUTS[0] @ t["beside"])),
                query_squared),
        Problem("leaf direct and upstream", linear(3), theta(), backbone, leaf_twice, query_ce,
                lr=0.6),
        Problem("parent in the loss", linear(3, False), theta(), backbone, parents_weight,
                query_ce),
        Problem("parent in the loss anchored", linear(3, False), theta(), backbone, parents_weight,
                query_ce, anchor="init"),
        Problem("parent makes features", linear(4, False), theta(), features_of_parent, ce,
                query_ce),
        Problem("same features twice", linear(3), theta(), backbone,
                lambda net, t, h: ce(net, t, h) + F.cross_entropy(net(h[0]), LABELS.roll(1)) / 3,
                query_ce),
        Problem("own output", linear(4), theta(), backbone,
                lambda net, t, h: F.cross_entropy(net(net(h[0])), torch.arange(SUPPORT) % WIDTH),
                query_own_output, anchor="init", l2=0.5),
        # Theta upstream of an input that phi is upstream of too.
        Problem("own output nudged", linear(4), theta(nudge=leaf(4)), backbone,
                lambda net, t, h: F.cross_entropy(
                    net(net(h[0]) + t["nudge"]), torch.arange(SUPPORT) % WIDTH),
                query_own_output, anchor="init", l2=0.8, lr=0.3),
    ]
    return {problem.name: problem for problem in found}


NAMES = list(make_problems())


def problem(name: str, **changes: Any) -> Problem:
    """A problem by name, with fields replaced."""
    return replace(make_problems()[name], **changes)


def solved(task: Problem) -> Tensor:
    """The oracle's inner minimum."""
    return minimize(task.inner, task.start(), task.leaves(), task.lr)


def expected(task: Problem, damping: float = 0.0) -> list[Tensor]:
    """The oracle's hypergradient."""
    return implicit(task.inner, task.outer, task.leaves(), solved(task), damping)


@cache
def minimum(name: str) -> Tensor:
    """Of a problem as it is in the table, computed once."""
    return solved(problem(name))


@cache
def truth(name: str, damping: float = 0.0) -> list[Tensor]:
    task = problem(name)
    return implicit(task.inner, task.outer, task.leaves(), minimum(name), damping)


EXACT = {"inner": Newton(cg_steps=200, tol=1e-13), "linear": CG(steps=200, tol=1e-13)}


def make_learner(task: Problem, cls: type[ImplicitCGHead] = ImplicitCGHead, **settings: Any) -> Any:
    """The parent of all clones for ``task``, solving as exactly as it can."""
    l2 = task.l2_of(task.theta)
    settings = {**EXACT, "l2": l2, "anchor": task.anchor, **settings}
    return cls(task.head, task.lr, **settings)


def adapt(
    parent: Any, task: Problem, how: str = "closure", steps: int = 40, cached: bool = True
) -> tuple[Any, Tensor]:
    """An adapted clone, by loss tensors or by a closure, and its query loss."""
    theta = {**task.theta, "initial": next(iter(task.head.parameters()))}
    learner = parent.clone()
    inputs = task.embed(theta)

    def support() -> Tensor:
        return task.support(learner, theta, inputs if cached else task.embed(theta))

    take_steps(learner, support, how, steps)
    return learner, task.query(learner, theta, inputs if cached else task.embed(theta))


def hypergradient(task: Problem, loss: Tensor) -> list[Tensor]:
    """Gradients in `Problem.leaves`; a head's initial value that has none fails the test."""
    for leaf_ in task.leaves():
        leaf_.grad = None
    loss.backward()
    gradients = [leaf_.grad for leaf_ in task.leaves()]
    assert all(g is not None for g in gradients), "a leaf of theta got no gradient"
    return [g for g in gradients if g is not None]


def error_where_it_ended(task: Problem, learner: Any, got: list[Tensor]) -> float:
    """Of a hypergradient, at the minimum next to the learner's: networks have more than one."""
    found, leaves = flat(learner.module.parameters()), task.leaves()
    phi = polish(task.inner, found, leaves)
    assert relative_error([found], [phi]) < 1e-6
    return relative_error(got, implicit(task.inner, task.outer, leaves, phi))
