"""Activation checkpointing, whose forward pass runs again, perhaps with other weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit_from, linear
from small_task import adapt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from two_layers import FIRST, HIDDEN, QUERY, WAYS, D, Net, X, Y, net_of, on_start, truth
from verdict import Heard, judge, off

from l2l_implicit import GradientDescent, Hessian, ImplicitCGHead, ImplicitMAML, Newton

KINDS: dict[str, dict[str, Any]] = {
    "not reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "not reentrant, no early stop": {"use_reentrant": False, "early_stop": False},
}


class First(nn.Linear):
    """The first layer, its forward pass checkpointed."""

    def __init__(self, kind: str) -> None:
        super().__init__(5, HIDDEN, dtype=D)
        self.load_state_dict(FIRST.state_dict())
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        settings = KINDS[self.kind]
        x = x.clone().requires_grad_() if settings["use_reentrant"] else x
        return checkpoint(super().forward, x, **settings)


class Whole(Net):
    """The whole network in one checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def whole() -> Net:
    net = net_of()
    made = Whole(net.first, net.bend)
    made.last = net.last
    return made


@pytest.mark.parametrize("kind", [*KINDS, "whole"])
@pytest.mark.parametrize("way", WAYS)
def test_solved(kind: str, way: str) -> None:
    make = whole if kind == "whole" else lambda: net_of(First(kind))
    judge(on_start(make, way, F.cross_entropy), truth())


@pytest.mark.parametrize("kind", [*KINDS, "whole"])
@pytest.mark.parametrize("how", ["closure", "losses"])
@pytest.mark.parametrize("inner", [GradientDescent(), Newton()], ids=repr)
def test_a_few_steps_are_those_without(kind: str, how: str, inner: Any) -> None:
    """Not solved and warned of; but the numbers are the same, or more is said."""

    def adapted(checkpointed: bool) -> Heard:
        def call() -> Tensor:
            if not checkpointed:
                net = net_of()
            else:
                net = whole() if kind == "whole" else net_of(First(kind))
            learner = ImplicitMAML(net, lr=0.5, l2=0.5, inner=inner, curvature=Hessian()).clone()
            adapt(learner, lambda: F.cross_entropy(learner(X), Y), how, 2)
            F.cross_entropy(learner(QUERY), Y).backward()
            return flat([*(p.grad for p in net.parameters()), *learner.module.parameters()])

        return Heard(call)

    plain, got = adapted(False), adapted(True)
    assert plain.error is None
    if got.error is not None:
        assert got.refused, repr(got.error)
    elif off(got.value, plain.value) > 1e-6:
        assert len(got.warned) > len(plain.warned), f"{off(got.value, plain.value):.2g} apart"


@pytest.mark.parametrize("kind", [*KINDS, "sequential"])
@pytest.mark.parametrize("how", ["closure", "losses"])
def test_a_checkpointed_backbone(kind: str, how: str) -> None:
    """Before the learner: its weights do not move, and the truth is that without."""
    l2, outer_y = 0.3, Y.roll(1)
    blocks = nn.Sequential(nn.Linear(5, HIDDEN), nn.Tanh()).double()
    blocks[0].load_state_dict(FIRST.state_dict())

    def features(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        if kind == "sequential":
            return checkpoint_sequential(blocks, 2, x, use_reentrant=False)
        return checkpoint(blocks, x, **KINDS[kind])

    def gradient() -> Tensor:
        blocks.zero_grad()
        learner = ImplicitCGHead(nn.Linear(HIDDEN, 3).double(), 0.1, l2=l2).clone()
        h = features(X)
        adapt(learner, lambda: F.cross_entropy(learner(h), Y), how, 20 if how == "closure" else 5)
        F.cross_entropy(learner(features(QUERY)), outer_y).backward()
        return flat(p.grad for p in blocks.parameters())

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        h = torch.tanh(linear(theta, X, HIDDEN))
        return F.cross_entropy(linear(phi, h, 3), Y) + l2 / 2 * phi.square().sum()

    def outer(phi: Tensor, theta: Tensor) -> Tensor:
        return F.cross_entropy(linear(phi, torch.tanh(linear(theta, QUERY, HIDDEN)), 3), outer_y)

    theta = flat(FIRST.parameters())
    judge(gradient, implicit_from(inner, outer, torch.zeros(3 * HIDDEN + 3, dtype=D), theta))
