"""Weights, settings and data that the user changes between two adapts, or before the backward."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit, solve
from small_task import HOWS, adapt
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from two_layers import LR, NETS, QUERY, D, X, Y, fit, forward, outer, start_of
from verdict import LIMIT, Heard, judge, must_be_right, off

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GaussNewton,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    Neumann,
    Newton,
)

EACH_NET = pytest.mark.parametrize("name", NETS)
L2 = 0.5


@cache
def truth(name: str, damping: float = 0.0) -> Tensor:
    """The query loss's derivative in the anchor, l2, and the features."""
    start = start_of(name)

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        anchor, l2, x = theta[: len(start)], theta[len(start)], theta[len(start) + 1 :].view(12, 5)
        regularizer = l2 / 2 * (phi - anchor).square().sum()
        return F.cross_entropy(forward(name, phi, x), Y) + regularizer

    theta = torch.cat([start, torch.tensor([L2], dtype=D), X.reshape(-1)])
    phi = solve(lambda p: inner(p, theta), start)
    return implicit(inner, outer(name), [theta], phi, damping)[0]


def query_loss(learner: Any) -> Tensor:
    return F.cross_entropy(learner(QUERY), Y)


@EACH_NET
def test_nothing_changed_is_right(name: str) -> None:
    """The control of all of the below."""
    net = copy.deepcopy(NETS[name])

    def gradient() -> Tensor:
        learner = ImplicitMAML(net, LR, l2=L2, inner=Newton()).clone()
        fit(learner, "closure", 30)
        query_loss(learner).backward()
        return flat(p.grad for p in net.parameters())

    must_be_right(gradient, truth(name)[: len(start_of(name))])


# Weights between two steps.


def mine(name: str) -> Tensor:
    """Other weights, of norm about 3."""
    n = len(start_of(name))
    return 3.0 / n**0.5 * torch.arange(n, dtype=D).sin() * 2**0.5


def named_pieces(learner: ImplicitCGHead, values: Tensor) -> dict[str, Tensor]:
    shapes = {k: p.shape for k, p in learner.module.named_parameters()}
    pieces = values.split([shape.numel() for shape in shapes.values()])
    pairs = zip(shapes.items(), pieces, strict=True)
    return {k: nn.Parameter(v.view(shape).clone()) for (k, shape), v in pairs}


def each(change: Callable[[Tensor, Tensor], Any]) -> Callable[[ImplicitCGHead, Tensor], None]:
    """``change`` of each parameter to its new value."""

    def run(learner: ImplicitCGHead, values: Tensor) -> None:
        new = named_pieces(learner, values).values()
        for p, value in zip(learner.module.parameters(), new, strict=True):
            change(p, value.data)

    return run


CHANGES = {
    "p.data =": each(lambda p, value: setattr(p, "data", value)),
    "p.data.copy_": each(lambda p, value: p.data.copy_(value)),
    "p.copy_": each(torch.no_grad()(lambda p, value: p.copy_(value))),
    "load_state_dict(assign=True)": lambda learner, v: learner.load_state_dict(
        {f"module.{k}": p for k, p in named_pieces(learner, v).items()}, assign=True),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name, how, inner, steps", [
    *((name, how, inner, 1) for name in NETS for how in ("closure", "loss")
      for inner in (GradientDescent(), Newton())),
    *(("linear", "closure", inner, 150) for inner in (LBFGS(), GradientDescent(adaptive=True))),
])  # fmt: skip
def test_weights_are_as_they_were_set(
    change: str, name: str, how: str, inner: Any, steps: int
) -> None:
    """Steps, the change, steps: the second are those of a learner that begins there."""

    def second() -> Tensor:
        learner = ImplicitCGHead(NETS[name], LR, l2=0.1, inner=inner).clone()
        fit(learner, how, steps)
        CHANGES[change](learner, mine(name))
        fit(learner, how, steps)
        return flat(learner.module.parameters())

    net = copy.deepcopy(NETS[name])
    vector_to_parameters(mine(name), net.parameters())
    fresh = ImplicitCGHead(net, LR, l2=0.1, inner=inner).clone()
    fit(fresh, how, steps)
    judge(second, flat(fresh.module.parameters()), 1e-6 if steps == 1 else LIMIT)


def test_a_solved_head_whose_weights_are_set_has_its_hypergradient() -> None:
    """In l2."""
    l2 = torch.tensor(L2, dtype=D, requires_grad=True)
    learner = ImplicitCGHead(NETS["linear"], LR, l2=l2, anchor="init").clone()
    for weights in (None, mine("linear")):
        if weights is not None:
            CHANGES["p.data ="](learner, weights)
        fit(learner, "loss")
    query_loss(learner).backward()
    must_be_right(lambda: l2.grad, truth("linear")[len(start_of("linear"))])


# Settings between two adapts: as a learner that has them from the start, or refused.

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "l2": ({"l2": 0.01}, {"l2": 2.0}),
    "l2, a tensor": ({"l2": 0.01}, {"l2": torch.tensor(2.0, dtype=D)}),
    "inner": ({"inner": GradientDescent()}, {"inner": Newton()}),
    "inner, the other way": ({"inner": Newton(cg_steps=1)}, {"inner": LBFGS()}),
    "inner's setting": ({"inner": GradientDescent()}, {"inner": GradientDescent(adaptive=True)}),
    "anchor": ({"anchor": "zero"}, {"anchor": "init"}),
    "lr": ({"inner": GradientDescent(), "lr": 1e-5}, {"lr": 0.5}),
    "linear": ({"linear": CG(steps=1)}, {"linear": Direct()}),
    "curvature": ({}, {"curvature": GaussNewton()}),
    "accuracy": ({"inner": LBFGS()}, {"accuracy": 1e-6}),
    "linear's damping": ({"linear": CG(damping=50.0)}, {"linear": CG(steps=200, tol=1e-12)}),
}


@EACH_NET
@pytest.mark.parametrize("setting, how", [
    (name, how) for name, (first, then) in SETTINGS.items() for how in ("closure", "loss")
    if how == "closure" or not isinstance({**first, **then}.get("inner"), LBFGS)  # wants a closure
])  # fmt: skip
@pytest.mark.parametrize("of_parent", [False, True], ids=["clone", "parent"])
def test_a_setting_that_is_changed_is_used(
    name: str, setting: str, how: str, of_parent: bool
) -> None:
    first, then = SETTINGS[setting]

    def adapted(late: bool) -> Tensor:
        net = copy.deepcopy(NETS[name])
        initial = {"lr": LR, "l2": L2, "anchor": "init", **first}
        parent = ImplicitCGHead(net, **{**initial, **({} if late else then)})
        learner = parent.clone()
        fit(learner, how, 3)
        for key, value in then.items() if late else ():
            setattr(parent if of_parent else learner, key, value)
        learner = parent.clone() if of_parent else learner
        fit(learner, how, 25)
        query_loss(learner).backward()
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]
        return flat([*learner.module.parameters(), *found])

    judge(lambda: adapted(True), adapted(False))


@EACH_NET
@HOWS
def test_the_next_step_has_the_lr_that_is_set(name: str, how: str) -> None:
    """What is not solved may be warned of, above, whatever its step: here the step is looked at."""

    def second_step(lr: float) -> Tensor:
        learner = ImplicitCGHead(copy.deepcopy(NETS[name]), 0.1, inner=GradientDescent()).clone()
        fit(learner, how, 1)
        before, learner.lr = flat(learner.module.parameters()), lr
        fit(learner, how, 1)
        return flat(learner.module.parameters()) - before

    torch.testing.assert_close(second_step(0.5), 5.0 * second_step(0.1))


@EACH_NET
@HOWS
@pytest.mark.parametrize("linear", [Direct(), CG(steps=300, tol=1e-12), Neumann(steps=3)], ids=repr)
def test_the_linear_solver_is_the_one_that_is_set(name: str, how: str, linear: Any) -> None:
    """Between adapt and backward the first one's system may be solved: a damped one, by request."""
    net, n = copy.deepcopy(NETS[name]), len(start_of(name))

    def gradient() -> Tensor:
        net.zero_grad()
        settings = {"inner": Newton(), "linear": CG(steps=1, damping=3.0)}
        learner = ImplicitMAML(net, LR, l2=L2, **settings).clone()
        fit(learner, how, 15)
        learner.linear = linear
        query_loss(learner).backward()
        return flat(p.grad for p in net.parameters())

    damped = Heard(gradient)
    if damped.error or off(damped.value, truth(name, 3.0)[:n]) > 0.02:
        judge(gradient, truth(name)[:n])


# Data, targets and coefficients that are changed in place.

IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "mul_": lambda t: t.mul_(3.0),
    ".data.mul_": lambda t: t.data.mul_(3.0),
    "copy_": lambda t: t.copy_(t.flip(0) * 2.0),  # a loader's one buffer for every batch
    "numpy": lambda t: t.detach().numpy().__setitem__(..., t.detach().flip(0).numpy() * 2.0),
}


def write(change: str, tensor: Tensor) -> None:
    """Other numbers into a tensor; classes stay classes."""
    with torch.no_grad():
        if tensor.is_floating_point():
            IN_PLACE[change](tensor)
        elif change == "numpy":
            tensor.numpy().fill(0)
        else:
            tensor.copy_(tensor.flip(-1))


@EACH_NET
@HOWS
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("what", ["x", "a leaf", "y", "l2", "weights of the loss", "anchor"])
def test_data_changed_before_backward(name: str, how: str, change: str, what: str) -> None:
    """The gradient, in the anchor, l2 and the data, is that of what was adapted to."""
    net, right = copy.deepcopy(NETS[name]), truth(name)

    def gradient() -> Tensor:
        x, y = X.clone().requires_grad_(what == "a leaf"), Y.clone()
        weight = torch.ones(12, dtype=D)
        l2 = torch.tensor(L2, dtype=D, requires_grad=True)
        learner = ImplicitMAML(net, LR, l2=l2, inner=Newton()).clone()

        def loss() -> Tensor:
            if what != "weights of the loss":
                return F.cross_entropy(learner(x), y)
            return (weight * F.cross_entropy(learner(x), y, reduction="none")).mean()

        adapt(learner, loss, how, 30 if how == "closure" else 12)
        outer_loss = query_loss(learner)
        changed = {"y": y, "l2": l2, "weights of the loss": weight}
        changed["anchor"] = next(net.parameters())
        write(change, changed.get(what, x))
        outer_loss.backward()
        found = [*(p.grad for p in net.parameters()), l2.grad, x.grad]
        return flat(g for g in found if g is not None)

    judge(gradient, right if what == "a leaf" else right[: len(start_of(name)) + 1])


@pytest.mark.parametrize("name, how, inner", [
    *((name, how, Newton()) for name in NETS for how in ("loss", "closure")),
    ("linear", "loss", LBFGS()),
])  # fmt: skip
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("what", ["x", "y", "l2"])
def test_data_changed_between_two_adapts(
    name: str, how: str, inner: Any, change: str, what: str
) -> None:
    """The second solves the problem as it then is, or one line says that it does not."""

    def adapted(late: bool) -> Tensor:
        net, x, y = copy.deepcopy(NETS[name]), X.clone(), Y.clone()
        l2 = torch.tensor(L2, dtype=D, requires_grad=True)
        learner = ImplicitMAML(net, LR, l2=l2, inner=inner).clone()
        for now in (not late, late):
            if now:
                write(change, {"x": x, "y": y, "l2": l2}[what])
            steps = 25 if how == "loss" and inner == Newton() else 60
            adapt(learner, lambda: F.cross_entropy(learner(x), y), how, steps)
        query_loss(learner).backward()
        return flat([*learner.module.parameters(), *(p.grad for p in net.parameters()), l2.grad])

    judge(lambda: adapted(True), adapted(False), 1e-3)
