"""Data, targets and coefficients that are changed in place between adapt and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit_from
from small_task import adapt
from torch import Tensor
from two_layers import LR, NETS, QUERY, D, X, Y, fit, forward, objective, outer, start_of
from verdict import judge, must_be_right

from l2l_implicit import Hessian, ImplicitMAML, Newton

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


@cache
def truth(name: str) -> Tensor:
    """In the anchor, l2, and the features."""
    start = start_of(name)

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        anchor, l2, x = theta[: len(start)], theta[len(start)], theta[len(start) + 1 :].view(12, 5)
        regularizer = l2 / 2 * (phi - anchor).square().sum()
        return F.cross_entropy(forward(name, phi, x), Y) + regularizer

    theta = torch.cat([start, torch.tensor([0.5], dtype=D), X.reshape(-1)])
    return implicit_from(inner, outer(name), start, theta)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("how", ["closure", "losses"])
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("what", ["x", "a leaf", "y", "l2", "weights of the loss", "anchor"])
def test_data_changed_before_backward(name: str, how: str, change: str, what: str) -> None:
    """The gradient, in the anchor, l2 and the data, is that of what was adapted to."""
    net, n = copy.deepcopy(NETS[name]), len(start_of(name))

    def gradient() -> Tensor:
        net.load_state_dict(NETS[name].state_dict())
        x, y = X.clone().requires_grad_(what == "a leaf"), Y.clone()
        weight = torch.ones(12, dtype=D)
        l2 = torch.tensor(0.5, dtype=D, requires_grad=True)
        learner = ImplicitMAML(net, LR, l2=l2, inner=Newton(), curvature=Hessian()).clone()

        def loss() -> Tensor:
            if what != "weights of the loss":
                return F.cross_entropy(learner(x), y)
            return (weight * F.cross_entropy(learner(x), y, reduction="none")).mean()

        adapt(learner, loss, how, 30 if how == "closure" else 12)
        query_loss = F.cross_entropy(learner(QUERY), Y)
        changed = {"y": y, "l2": l2, "weights of the loss": weight}
        changed["anchor"] = next(net.parameters())
        write(change, changed.get(what, x))
        query_loss.backward()
        found = [*(p.grad for p in net.parameters()), l2.grad, x.grad]
        return flat(g for g in found if g is not None)

    right = truth(name)
    judge(gradient, right if what == "a leaf" else right[: n + 1])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("how", ["closure", "losses"])
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("what", ["x", "y", "l2"])
def test_data_changed_between_two_adapts(name: str, how: str, change: str, what: str) -> None:
    """The second solves the problem as it then is, or one line says that it does not."""

    def adapted(late: bool) -> Tensor:
        net, x, y = copy.deepcopy(NETS[name]), X.clone(), Y.clone()
        l2 = torch.tensor(0.5, dtype=D, requires_grad=True)
        maml = ImplicitMAML(net, LR, l2=l2, inner=Newton(), curvature=Hessian())

        def changed() -> None:
            write(change, {"x": x, "y": y, "l2": l2}[what])

        if not late:
            changed()
        learner = maml.clone()
        for turn in range(2):
            if turn == 1 and late:
                changed()
            steps = 60 if how == "closure" else 25
            adapt(learner, lambda: F.cross_entropy(learner(x), y), how, steps)
        F.cross_entropy(learner(QUERY), Y).backward()
        return flat([*learner.module.parameters(), *(p.grad for p in net.parameters()), l2.grad])

    judge(lambda: adapted(True), adapted(False), 1e-3)


@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("what", ["features", "targets"])
def test_data_of_tasks_together(change: str, what: str) -> None:
    """The same for `adapt_together`: the gradient in l2."""
    head = NETS["linear"]

    def gradient() -> Tensor:
        l2 = torch.tensor(0.5, dtype=D, requires_grad=True)
        learner = ImplicitMAML(head, LR, l2=l2, inner=Newton())
        x, y = X.clone().unsqueeze(0), Y.clone().unsqueeze(0)
        adapted = learner.adapt_together(x, y, steps=20)
        query_loss = F.cross_entropy(adapted(QUERY.unsqueeze(0)).squeeze(0), Y)
        write(change, x if what == "features" else y)
        query_loss.backward()
        return l2.grad.reshape(1)

    start, half = start_of("linear"), torch.tensor([0.5], dtype=D)
    right = implicit_from(
        lambda p, t: objective("linear", p, t[0], start), outer("linear"), start, half
    )
    judge(gradient, right)


@pytest.mark.parametrize("name", NETS)
def test_nothing_changed_is_right(name: str) -> None:
    """The control of all of the above."""
    start = start_of(name)

    def gradient() -> Tensor:
        net = copy.deepcopy(NETS[name])
        learner = ImplicitMAML(net, LR, l2=0.5, inner=Newton(), curvature=Hessian()).clone()
        fit(learner, "closure", 30)
        F.cross_entropy(learner(QUERY), Y).backward()
        return flat(p.grad for p in net.parameters())

    right = implicit_from(lambda p, t: objective(name, p, 0.5, t), outer(name), start, start)
    must_be_right(gradient, right)
