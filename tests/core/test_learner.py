"""learn2learn's contract, and modules of many kinds."""

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from small_task import SIX_LABELS as Y
from small_task import fit
from small_task import six_inputs as x
from torch import Tensor, nn

from l2l_implicit import CG, GradientDescent, ImplicitCGHead, ImplicitMAML, Newton

from learn2learn.algorithms import MAML  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = pytest.mark.usefixtures("float64")


EXACT = {"inner": Newton(cg_steps=200, tol=1e-12), "linear": CG(steps=200, tol=1e-12)}


class MyHead(ImplicitCGHead):
    """A subclass with a constructor of its own, an attribute, and a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 3), lr=0.1)
        self.note, self.gain = ["kept"], nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("method", ["__init__", "clone", "adapt", "forward"])
def test_signature_begins_as_learn2learns(method: str) -> None:
    ours = list(inspect.signature(getattr(ImplicitCGHead, method)).parameters.values())
    theirs = list(inspect.signature(getattr(MAML, method)).parameters.values())
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    # Any other keyword is there to be refused, with the new name of an old one.
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[len(theirs) :])
    assert isinstance(ImplicitCGHead(nn.Linear(2, 2), 0.1), MAML)


def test_clone_keeps_class_and_attributes() -> None:
    parent = MyHead(4)
    clone = parent.clone().clone()
    assert type(clone) is MyHead and clone.note is parent.note and clone.gain is parent.gain
    assert clone.module.weight is not parent.module.weight
    inputs = x()
    assert torch.equal(clone(inputs), parent(inputs))
    clone.extra, clone.note = 1, []
    assert not hasattr(parent, "extra") and parent.note == ["kept"]


def test_missing_attributes_come_from_the_module() -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1)
    assert parent.out_features == parent.clone().out_features == 3
    with pytest.raises(AttributeError):
        _ = parent.clone().no_such_thing


def test_clone_overrides_flags() -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1)
    flags = {"first_order": True, "allow_unused": True, "allow_nograd": True}
    clone = parent.clone(**flags)
    assert all(getattr(clone, name) is True for name in flags)
    assert not any(getattr(parent.clone(), name) for name in flags)
    assert ImplicitCGHead(nn.Linear(4, 3), 0.1, allow_nograd=True).allow_unused is True


def test_state_dict_has_learn2learns_keys() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ours, theirs = ImplicitCGHead(copy.deepcopy(module), 0.1), MAML(module, 0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.clone().state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_of_a_parent(way: str, used: bool, tmp_path) -> None:
    parent = MyHead(4) if way == "deepcopy" else ImplicitCGHead(nn.Linear(4, 3), 0.1, l2=0.7)
    if used:
        learner = parent.clone()
        fit(learner, x())
        learner(x()).sum().backward()
    if way == "deepcopy":
        twin = copy.deepcopy(parent)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(parent))
    else:
        torch.save(parent, tmp_path / "head.pt")
        twin = torch.load(tmp_path / "head.pt", weights_only=False)
    assert type(twin) is type(parent) and twin.l2 == parent.l2
    assert twin.module.weight is not parent.module.weight
    inputs, pair = x(), (parent.clone(), twin.clone())
    for learner in pair:
        learner.zero_grad()
        fit(learner, inputs, "closure")
    assert torch.equal(pair[0](inputs), pair[1](inputs))
    parent.zero_grad(), twin.zero_grad()
    pair[1](inputs).square().sum().backward()
    assert twin.module.weight.grad is not None and parent.module.weight.grad is None


def test_state_dict_through_a_file(tmp_path) -> None:
    parent, other = (ImplicitCGHead(nn.Linear(4, 3), 0.1) for _ in range(2))
    torch.save(parent.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.module.weight, parent.module.weight)


@pytest.mark.parametrize("how", ["loss", "closure"])
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


def test_batch_norm_buffers_are_shared_with_the_parent() -> None:
    for cls in (MAML, ImplicitCGHead):
        parent = cls(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), 0.1)
        learner = parent.clone()
        learner.adapt(F.cross_entropy(learner(x()), Y))
        assert learner.module[1].running_mean is parent.module[1].running_mean
        assert int(parent.module[1].num_batches_tracked) == 1


class Shared(nn.Module):
    """One weight by two names and two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight, self.alias = self.first.weight, self.first

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.alias(inputs)))))


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(4, 5, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.cell(inputs.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


MODULES: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "LSTM": lambda: Recurrent("LSTM"),
    "GRU": lambda: Recurrent("GRU"),
    "RNN": lambda: Recurrent("RNN"),
}


@pytest.mark.parametrize("how", ["loss", "closure"])
@pytest.mark.parametrize("kind", list(MODULES))
def test_other_modules(kind: str, how: str) -> None:
    """The inner minimum is one (its gradient is zero), and the parent gets a gradient."""
    parent = ImplicitCGHead(MODULES[kind](), 0.1, anchor="init", l2=1.0, **EXACT)
    learner, inputs = parent.clone(), x()
    count = len(list(parent.module.parameters()))
    fit(learner, inputs, how, 15)
    new = list(learner.module.parameters())
    assert len(new) == count and not any(
        a is b for a, b in zip(new, parent.module.parameters(), strict=True)
    )
    objective = F.cross_entropy(learner(inputs), Y) + 0.5 * sum(
        (p - a.detach()).square().sum() for p, a in zip(new, parent.parameters(), strict=True)
    )
    slopes = torch.autograd.grad(objective, new)
    assert max(float(g.abs().max()) for g in slopes) < 1e-8
    F.cross_entropy(learner(inputs), Y.roll(1)).backward()
    assert all(p.grad is not None and p.grad.any() for p in parent.parameters())


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_unused_parameters_go_to_their_anchor(how: str) -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)})
    parent = ImplicitCGHead(module, 0.1, allow_unused=True, anchor="init")
    learner, inputs = parent.clone(), x()

    def loss() -> Tensor:
        return F.cross_entropy(learner.module["used"](inputs), Y)

    for _ in range(5):
        learner.adapt(loss() if how == "loss" else loss)
    idle, before = learner.module["idle"], parent.module["idle"]
    assert torch.equal(idle.weight, before.weight)
    (loss() + idle.weight.sum()).backward()
    assert torch.allclose(before.weight.grad, torch.ones(2, 2), rtol=1e-3)


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_frozen_parameters_stay(how: str) -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, allow_nograd=True, anchor="init")
    parent.module.bias.requires_grad_(False)
    learner, inputs = parent.clone(), x()
    fit(learner, inputs, how)
    F.cross_entropy(learner(inputs), Y).backward()
    assert torch.equal(learner.module.bias, parent.module.bias)
    assert parent.module.bias.grad is None and parent.module.weight.grad.any()


def test_imaml_is_the_same_class_with_other_defaults() -> None:
    maml = ImplicitMAML(nn.Linear(4, 3), 0.1)
    assert isinstance(maml, ImplicitCGHead)
    assert (maml.anchor, maml.l2) == ("init", 2.0)
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
