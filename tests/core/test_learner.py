"""What the learners do beyond learn2learn's contract (test_contract.py), and other modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from problems import EXACT
from small_task import HOWS, adapt, fit
from small_task import SIX_LABELS as Y
from small_task import six_inputs as x
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    GradientDescent,
    Hessian,
    ImplicitCGHead,
    ImplicitMAML,
)

pytestmark = pytest.mark.usefixtures("float64")


@HOWS
@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_without_a_clone(how: str, anchor: str) -> None:
    """The parent itself adapts: its first parameters are still the initial value."""
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, anchor=anchor, **EXACT)
    control = ImplicitCGHead(copy.deepcopy(parent.module), 0.1, anchor=anchor, **EXACT)
    initial, inputs = list(parent.module.parameters()), x()
    clone = control.clone()
    for learner in (parent, clone):
        fit(learner, inputs, how)
        learner(inputs).square().sum().backward()
    grads = [p.grad for p in control.module.parameters()]
    assert all(p.grad is not None for p in initial)
    assert relative_error([p.grad for p in initial], grads) < 1e-9 or not any(
        g.any() for g in grads
    )


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.last = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.cell(inputs.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


@HOWS
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_modules(kind: type[nn.RNNBase], how: str) -> None:
    """The inner minimum is one (its gradient is zero), and the parent gets a gradient."""
    parent = ImplicitCGHead(Recurrent(kind), 0.1, anchor="init", l2=1.0, **EXACT)
    learner, inputs, initial = parent.clone(), x(), list(parent.module.parameters())
    fit(learner, inputs, how, 15)
    new = list(learner.module.parameters())
    squares = sum((p - a.detach()).square().sum() for p, a in zip(new, initial, strict=True))
    objective = F.cross_entropy(learner(inputs), Y) + 0.5 * squares
    slopes = torch.autograd.grad(objective, new)
    assert max(float(g.abs().max()) for g in slopes) < 1e-8
    F.cross_entropy(learner(inputs), Y.roll(1)).backward()
    assert all(p.grad is not None and p.grad.any() for p in initial)


@HOWS
def test_unused_parameters_go_to_their_anchor(how: str) -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)})
    parent = ImplicitCGHead(module, 0.1, allow_unused=True, anchor="init")
    learner, inputs = parent.clone(), x()

    def loss() -> Tensor:
        return F.cross_entropy(learner.module["used"](inputs), Y)

    for _ in range(5):
        adapt(learner, loss, how, 1)
    idle, before = learner.module["idle"], parent.module["idle"]
    assert torch.equal(idle.weight, before.weight)
    (loss() + idle.weight.sum()).backward()
    assert torch.allclose(before.weight.grad, torch.ones(2, 2), rtol=1e-3)


def test_imaml_is_the_same_class_with_other_defaults() -> None:
    maml = ImplicitMAML(nn.Linear(4, 3), 0.1)
    assert isinstance(maml, ImplicitCGHead)
    assert (maml.anchor, maml.l2, maml.curvature) == ("init", 0.5, Hessian())
    assert (maml.inner, maml.linear) == (GradientDescent(), CG())
    assert type(maml.clone()) is ImplicitMAML


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_batch_norm_may_be_adapted_by_a_closure() -> None:
    """The look at the second derivative puts running statistics back as if it had not been."""
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    maml, inputs = ImplicitMAML(network, 0.1), x()
    passes = []
    for _ in range(2):  # it looks at the first task alone
        learner = maml.clone()
        learner.adapt(lambda learner=learner: F.cross_entropy(learner(inputs), Y), steps=1)
        passes.append(int(learner.module[1].num_batches_tracked))
        F.cross_entropy(learner(inputs), Y).backward()
    assert passes == [2, 5] and network[0].weight.grad.norm() > 0  # two, the query, two more
