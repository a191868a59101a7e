"""With ``first_order=True`` the learner is exactly learn2learn's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_task import HOWS
from small_task import SIX_LABELS as Y
from small_task import six_inputs as x
from small_task import small_nets as nets
from torch import Tensor

from l2l_implicit import ImplicitCGHead

from learn2learn.algorithms import MAML  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("name", list(nets()))
@pytest.mark.parametrize("where", ["constructor", "clone", "adapt"])
@HOWS
def test_first_order_is_exactly_learn2learns(how: str, name: str, where: str) -> None:
    torch.manual_seed(1)
    module, theta, data = nets()[name], torch.randn(4, 4, requires_grad=True), x()
    parents = MAML(module, 0.3, first_order=True), ImplicitCGHead(
        copy.deepcopy(module), 0.3, first_order=where == "constructor"
    )
    found = []
    for parent in parents:
        ours = type(parent) is not MAML
        learner = parent.clone(**({"first_order": True} if ours and where == "clone" else {}))
        h = torch.tanh(data @ theta)
        flag = {"first_order": True} if ours and where == "adapt" else {}

        def loss(learner=learner, h=h, y=Y) -> Tensor:
            return F.cross_entropy(learner(h), y)

        if ours and how == "closure":
            learner.adapt(loss, steps=4, **flag)
        for _ in range(0 if ours and how == "closure" else 4):
            learner.adapt(loss(), **flag)
        theta.grad = None
        loss(y=Y.roll(1)).backward()
        grads = [p.grad for p in parent.parameters()]
        found.append([*learner.module.parameters(), *grads, theta.grad, *learner.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
