"""What learn2learn's users, and its own tests of MAML, ask of a learner: test functions.

A test file imports them all and has a fixture ``make``: ``make(module, lr, **settings)`` gives a
learner. `tests/core/test_contract.py` asks the implicit learners,
`tests/baselines/test_baselines_contract.py` the baselines.
"""

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import peak_of_live_tensors, relative_error
from small_task import network
from torch import Tensor, nn

import l2l_implicit  # noqa: F401  (first: it makes learn2learn importable)

from learn2learn.algorithms import MAML  # isort: skip

LR, LABELS = 0.05, torch.arange(9) % 3
CUT = ("itd", "reptile", "reptile adam")  # by design no gradient goes back to the initial value
Make = Callable[..., Any]


def inputs() -> Tensor:
    return torch.randn(9, 4)


def loss_of(learner: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(learner(x), LABELS)


def learn(parent: Any, x: Tensor, steps: int = 3) -> Any:
    learner = parent.clone()
    for _ in range(steps):
        learner.adapt(loss_of(learner, x))
    return learner


def outer_step(parent: Any, x: Tensor, steps: int = 3) -> Any:
    """A task with its backward pass, which adds to the parent's gradients."""
    learner = learn(parent, x, steps)
    F.cross_entropy(learner(x), LABELS.roll(1)).backward()
    if hasattr(learner, "outer_gradient"):
        learner.outer_gradient()
    return learner


def outer_gradients(parent: Any, x: Tensor) -> list[Tensor]:
    parent.zero_grad()
    outer_step(parent, x)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parent.parameters()]


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", ["__init__", "clone", "adapt", "forward"])
def test_signature_begins_as_learn2learns(method: str, make: Make) -> None:
    cls = type(make(network(), LR))
    ours = list(inspect.signature(getattr(cls, method)).parameters.values())
    theirs = list(inspect.signature(getattr(MAML, method)).parameters.values())
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    # Any other keyword is there to be refused, with the new name of an old one.
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[len(theirs) :])
    assert len(ours) >= len(theirs) and issubclass(cls, MAML)


def test_a_clone_keeps_class_and_settings(make: Make) -> None:
    parent = make(nn.Linear(4, 3), LR)
    parent.note = ["kept"]
    flags = {"first_order": True, "allow_unused": True, "allow_nograd": True}
    clone = parent.clone().clone(**flags)
    assert type(clone) is type(parent) and clone.note is parent.note and clone.lr is parent.lr
    assert all(getattr(clone, name) is True for name in flags)
    assert not parent.clone().allow_unused and not parent.clone().allow_nograd
    assert make(nn.Linear(4, 3), LR, allow_nograd=True).allow_unused is True
    assert clone.out_features == 3 and clone.module.weight is not parent.module.weight
    with pytest.raises(AttributeError):
        _ = clone.no_such_thing
    clone.extra, clone.note = 1, []
    assert not hasattr(parent, "extra") and parent.note == ["kept"]


def test_before_any_step_a_clone_is_the_model(make: Make, request: pytest.FixtureRequest) -> None:
    """What it computes, and the gradient that reaches every parameter."""
    module, x = network(), inputs().requires_grad_()
    parent, leaves = make(module, LR), [x, *module.parameters()]
    outputs = [parent.clone()(x) for _ in range(3)]
    assert all(torch.equal(out, module(x)) for out in outputs)
    loss = F.cross_entropy(outputs[0], LABELS)
    got = torch.autograd.grad(loss, leaves, allow_unused=True)
    expected = torch.autograd.grad(loss_of(module, x), leaves)
    if request.node.callspec.id in CUT:
        assert not any(g is not None for g in got[1:])
        got, expected = got[:1], expected[:1]
    assert equal(got, expected)


def test_a_step_lowers_the_loss_and_leaves_a_gradient(
    make: Make, request: pytest.FixtureRequest
) -> None:
    x, module = inputs(), network()
    module.register_buffer("dummy", torch.zeros(2, 2))
    parent = make(module, LR)
    learner = outer_step(parent, x, 1)
    assert float(loss_of(learner, x)) < float(loss_of(parent, x))
    assert torch.equal(parent.module.dummy, learner.module.dummy)
    learns = request.node.callspec.id != "itd"
    assert all((p.grad is not None) is learns for p in parent.parameters())


def test_state_dict(make: Make) -> None:
    def fresh() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    theirs, ours, twin = MAML(fresh(), LR), make(fresh(), LR), make(fresh(), LR)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(key.startswith("module.") for key in ours.state_dict())
    for other in (twin, theirs):
        other.load_state_dict(ours.clone().state_dict())
        assert equal(other.parameters(), ours.parameters())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_of_a_parent(way: str, used: bool, make: Make, tmp_path: Path) -> None:
    parent, x = make(network(), LR), inputs()
    if used:
        outer_step(parent, x)
    parent.zero_grad()
    if way == "torch.save":
        torch.save(parent, tmp_path / "head.pt")
        twin = torch.load(tmp_path / "head.pt", weights_only=False)
    else:
        twin = copy.deepcopy(parent) if way == "deepcopy" else pickle.loads(pickle.dumps(parent))
    assert type(twin) is type(parent) and repr(twin.lr) == repr(parent.lr)
    found = outer_gradients(twin, x)
    assert all(p.grad is None for p in parent.parameters())
    assert equal(found, outer_gradients(parent, x))


def test_without_gradients(make: Make, request: pytest.FixtureRequest) -> None:
    """The same values, and no trace of the task anywhere."""
    x, parent = inputs(), make(network(), LR)
    control = parent.clone()
    control.adapt(lambda: loss_of(control, x), steps=3)
    with torch.no_grad():
        quiet = parent.clone()
        quiet.adapt(lambda: loss_of(quiet, x), steps=3)
        assert not quiet(x).requires_grad
    assert relative_error(list(quiet.parameters()), list(control.parameters())) < 1e-12
    if request.node.callspec.id != "implicit, first order":  # it keeps its plain steps' graph
        assert all(p.is_leaf and p.requires_grad for p in quiet.module.parameters())
        loss_of(quiet, x).backward()
    assert all(p.grad is None for p in parent.parameters())


def test_a_clone_made_without_gradients_can_adapt_with_them(make: Make) -> None:
    theta, parent = torch.ones(4, requires_grad=True), make(network(), LR)
    with torch.no_grad():
        quiet = parent.clone()
    h = inputs() * theta
    for _ in range(2):
        quiet.adapt(loss_of(quiet, h))
    F.cross_entropy(quiet(h), LABELS.roll(1)).backward()
    assert bool(theta.grad.any())


def test_tasks_accumulate(make: Make) -> None:
    x, theta = inputs(), torch.ones(4, requires_grad=True)
    parent = make(network(), LR)
    outer_step(parent, x)  # the first task of a learner is looked at more closely
    outer_gradients(parent, x * theta)
    leaves = [p for p in [theta, *parent.parameters()] if p.grad is not None]
    once = [p.grad.clone() for p in leaves]
    outer_step(parent, x * theta)
    assert relative_error([p.grad for p in leaves], [2 * g for g in once]) < 1e-12


@pytest.mark.parametrize("where", ["adapt", "constructor", "clone"])
def test_frozen_parameters_stay(where: str, make: Make) -> None:
    module, flag, x = network(), {"allow_nograd": True}, inputs()
    module[2].weight.requires_grad_(False)
    parent = make(module, LR, **(flag if where == "constructor" else {}))
    learner = parent.clone(**(flag if where == "clone" else {}))
    if where == "adapt":
        with pytest.raises((RuntimeError, ValueError, UnboundLocalError)):
            learner.adapt(loss_of(learner, x))
    learner.adapt(loss_of(learner, x), **(flag if where == "adapt" else {}))
    loss_of(learner, x).backward()
    frozen = learner.module[2].weight
    assert torch.equal(frozen, module[2].weight) and not frozen.requires_grad
    assert module[2].weight.grad is None
    assert not torch.equal(learner.module[0].weight, module[0].weight)


def test_unused_parameters_stay(make: Make) -> None:
    module, x = nn.ModuleDict({"idle": nn.Linear(2, 2), "used": nn.Linear(4, 3)}), inputs()
    learner = make(module, LR, allow_unused=True).clone()
    for _ in range(3):
        learner.adapt(loss_of(learner.module["used"], x))
    assert torch.equal(learner.module["idle"].weight, module["idle"].weight)
    assert not torch.equal(learner.module["used"].weight, module["used"].weight)


class Shared(nn.Module):
    """One weight by two names, a module by two paths, and an RNN."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight, self.alias = self.first.weight, nn.ModuleDict({"again": self.first})
        self.rnn, self.last = kind(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.alias["again"](x))))
        return self.last(self.rnn(x.unsqueeze(1).expand(-1, 2, -1))[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_shared_and_recurrent_parameters(kind: type[nn.RNNBase], make: Make) -> None:
    parent, x = make(Shared(kind), 0.01), inputs()
    learner = learn(parent, x)
    assert learner.module.second.weight is learner.module.first.weight
    assert learner.module.alias["again"].weight is learner.module.first.weight
    after = loss_of(learner, x)
    assert float(after.detach()) < float(loss_of(parent, x).detach())
    (slope,) = torch.autograd.grad(after, learner.module.rnn.weight_hh_l0)
    assert slope.any() and len(list(learner.module.parameters())) == 9
    loss_of(learner, x).backward()


def test_batch_norm_buffers_are_shared_with_the_parent(make: Make) -> None:
    module, x = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), inputs()
    control = copy.deepcopy(module)
    for of, learner in ((control, MAML(control, LR).clone()), (module, make(module, LR).clone())):
        learner.adapt(loss_of(learner, x))
        assert learner.module[1].running_mean is of[1].running_mean
    assert torch.equal(module[1].running_mean, control[1].running_mean)
    assert int(module[1].num_batches_tracked) == 1


def test_task_after_task_nothing_is_left_of_the_one_before(make: Make) -> None:
    parent, x = make(nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 3)), LR), inputs()

    def tasks(count: int) -> None:
        for _ in range(count):
            outer_step(parent, x, 2)
            parent.zero_grad()

    tasks(1)
    few = max(peak_of_live_tensors(lambda: tasks(2)) for _ in range(2))
    assert peak_of_live_tensors(lambda: tasks(8)) < 1.05 * few


__all__ = [name for name in dir() if name.startswith("test_")]
