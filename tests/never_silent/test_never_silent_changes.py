"""Weights and settings that the user changes between two adapts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit_from, solve
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters
from two_layers import LR, NETS, QUERY, D, Y, fit, forward, objective, outer, start_of
from verdict import Heard, judge, off

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GradientDescent,
    Hessian,
    ImplicitCGHead,
    ImplicitMAML,
    Neumann,
    Newton,
)


def mine(name: str) -> Tensor:
    """Other weights, of norm about 3."""
    n = len(start_of(name))
    return 3.0 / n**0.5 * torch.arange(n, dtype=D).sin() * 2**0.5


# Weights between two steps.


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


def by_state(learner: ImplicitCGHead, values: Tensor) -> None:
    learner.module.load_state_dict(named_pieces(learner, values), assign=True)


def by_learners_state(learner: ImplicitCGHead, values: Tensor) -> None:
    state = {f"module.{k}": v for k, v in named_pieces(learner, values).items()}
    learner.load_state_dict(state, assign=True)


def by_attribute(learner: ImplicitCGHead, values: Tensor) -> None:
    """New parameters in place of the old ones."""
    for name, value in named_pieces(learner, values).items():
        *path, last = name.split(".")
        owner = learner.module.get_submodule(".".join(path))
        delattr(owner, last)
        setattr(owner, last, value)


CHANGES = {
    "p.data =": each(lambda p, value: setattr(p, "data", value)),
    "p.data.copy_": each(lambda p, value: p.data.copy_(value)),
    "p.copy_": each(torch.no_grad()(lambda p, value: p.copy_(value))),
    "vector_to_parameters": lambda learner, v: vector_to_parameters(v, learner.module.parameters()),
    "load_state_dict(assign=True)": by_state,
    "learner.load_state_dict(assign=True)": by_learners_state,
    "new parameters": by_attribute,
}
SOLVERS = [GradientDescent(adaptive=True), LBFGS(), Newton()]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["closure", "losses"])
def test_weights_are_as_they_were_set(name: str, change: str, how: str) -> None:
    """One step, the change, one step: the second is that of a learner that begins there."""
    inner: Any
    for inner in (GradientDescent(), Newton()):

        def second(inner: Any = inner) -> Tensor:
            learner = ImplicitCGHead(NETS[name], LR, l2=0.1, inner=inner).clone()
            fit(learner, how)
            CHANGES[change](learner, mine(name))
            fit(learner, how)
            return flat(learner.module.parameters())

        net = copy.deepcopy(NETS[name])
        vector_to_parameters(mine(name), net.parameters())
        fresh = ImplicitCGHead(net, LR, l2=0.1, inner=inner).clone()
        fit(fresh, how)
        judge(second, flat(fresh.module.parameters()), 1e-6)


@pytest.mark.parametrize("inner", SOLVERS, ids=repr)
@pytest.mark.parametrize("change", CHANGES)
def test_a_solved_head_whose_weights_are_set_is_solved_again(inner: Any, change: str) -> None:
    def again() -> Tensor:
        learner = ImplicitCGHead(NETS["linear"], LR, l2=0.1, inner=inner).clone()
        fit(learner, "closure", 150)
        CHANGES[change](learner, mine("linear"))
        fit(learner, "closure", 150)
        F.cross_entropy(learner(QUERY), Y).backward()
        return flat(learner.module.parameters())

    judge(again, solve(lambda p: objective("linear", p, 0.1), torch.zeros(18, dtype=D)))


@cache
def in_l2(name: str) -> Tensor:
    start, one = start_of(name), torch.ones(1, dtype=D)
    return implicit_from(lambda p, t: objective(name, p, t[0], start), outer(name), start, one)


@cache
def in_anchor(name: str) -> Tensor:
    start = start_of(name)
    return implicit_from(lambda p, t: objective(name, p, 0.5, t), outer(name), start, start)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["closure", "losses"])
def test_hypergradients_after_a_change(name: str, change: str, how: str) -> None:
    """Solved, changed, solved again; the gradient in l2 of a loss on the queries."""

    def gradient() -> Tensor:
        l2 = torch.tensor(1.0, dtype=D, requires_grad=True)
        learner = ImplicitCGHead(NETS[name], LR, l2=l2, anchor="init", inner=Newton()).clone()
        fit(learner, how, 12)
        CHANGES[change](learner, start_of(name) * 1.1)
        fit(learner, how, 12)
        F.cross_entropy(learner(QUERY), Y).backward()
        return l2.grad.reshape(1)

    judge(gradient, in_l2(name))


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
    "linear's damping": ({"linear": CG(damping=50.0)}, {"linear": CG(steps=200, tol=1e-12)}),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("setting, how", [
    (name, how) for name, (_, then) in SETTINGS.items() for how in ("closure", "losses")
    if how == "closure" or not isinstance(then.get("inner"), LBFGS)  # which wants a closure
])  # fmt: skip
@pytest.mark.parametrize("of_parent", [False, True], ids=["clone", "parent"])
def test_a_setting_that_is_changed_is_used(
    name: str, setting: str, how: str, of_parent: bool
) -> None:
    first, then = SETTINGS[setting]

    def adapted(late: bool) -> Tensor:
        net = copy.deepcopy(NETS[name])
        initial = {"lr": LR, "l2": 0.5, **first} if late else {"lr": LR, "l2": 0.5, **first, **then}
        parent = ImplicitCGHead(net, **initial)
        learner = parent.clone()
        fit(learner, how, 3)
        for key, value in then.items() if late else ():
            setattr(parent if of_parent else learner, key, value)
        learner = parent.clone() if of_parent else learner
        fit(learner, how, 25)
        F.cross_entropy(learner(QUERY), Y).backward()
        found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in net.parameters()]
        return flat([*learner.module.parameters(), *found])

    judge(lambda: adapted(True), adapted(False))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("how", ["closure", "losses"])
@pytest.mark.parametrize("linear", [Direct(), CG(steps=300, tol=1e-12), Neumann(steps=3)], ids=repr)
@pytest.mark.parametrize("moment", ["before adapt", "before backward"])
def test_the_linear_solver_is_the_one_that_is_set(
    name: str, how: str, linear: Any, moment: str
) -> None:
    def gradient() -> Tensor:
        learner = ImplicitMAML(
            net, LR, l2=0.5, inner=Newton(), linear=CG(steps=1, damping=3.0),
            curvature=Hessian(),
        ).clone()
        if moment == "before adapt":
            learner.linear = linear
        fit(learner, how, 15)
        if moment == "before backward":
            learner.linear = linear
        F.cross_entropy(learner(QUERY), Y).backward()
        return flat(p.grad for p in net.parameters())

    net, right = copy.deepcopy(NETS[name]), in_anchor(name)
    damped = Heard(gradient)  # solved with the damping of the first one: another system, by request
    net.zero_grad()
    if moment == "before backward" and damped.error is None:
        first = with_damping(name, 3.0)
        if off(damped.value, first) < 0.02:
            return
    judge(gradient, right)


def with_damping(name: str, damping: float) -> Tensor:
    """The hypergradient in the anchor from the damped system: ``l2 (H + damping)^-1 b``."""
    start = start_of(name)
    phi = solve(lambda p: objective(name, p, 0.5, start), start)
    h = torch.func.hessian(lambda p: objective(name, p, 0.5, start))(phi)
    b = torch.func.grad(lambda p: F.cross_entropy(forward(name, p, QUERY), Y))(phi)
    return 0.5 * torch.linalg.solve(h + damping * torch.eye(len(phi), dtype=D), b)
