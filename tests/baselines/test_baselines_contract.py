"""learn2learn's contract, asked of every baseline."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import higher  # noqa: F401  (these tests need the extra "baselines")
import pytest
import torch
import torch.nn.functional as F
from baseline_oracles import Case, gradients, make_case, outer_step, query_loss, support_loss
from oracles import relative_error
from torch import Tensor, nn

from l2l_implicit.baselines import Learn2LearnMAML, Reptile, UnrolledMAML

from learn2learn.algorithms import MAML  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = pytest.mark.usefixtures("float64")

LEARNERS: dict[str, Callable[..., Any]] = {
    "unrolled": UnrolledMAML,
    "first order": lambda *args, **kw: UnrolledMAML(*args, **{"first_order": True, **kw}),
    "itd": lambda *args, **kw: UnrolledMAML(*args, learn_init=False, **kw),
    "adam": lambda *args, **kw: UnrolledMAML(*args, optimizer="adam", **kw),
    "learn2learn": Learn2LearnMAML,
    "reptile": Reptile,
    "reptile adam": lambda *args, **kw: Reptile(*args, optimizer="adam", **kw),
}
EVERY = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS.keys())
CLASSES = pytest.mark.parametrize("cls", [UnrolledMAML, Learn2LearnMAML, Reptile])
LR = 0.05


def values(learner: Any) -> list[Tensor]:
    return [p.detach() for p in learner.module.parameters()]


def outer_gradients(parent: Any, case: Case, steps: int = 3) -> list[Tensor]:
    """What one outer step adds to the gradients of the initial value and of theta."""
    for leaf in [*case.module.parameters(), *case.theta]:
        leaf.grad = None
    learner = outer_step(parent, case, steps)
    if isinstance(learner, Reptile):
        learner.outer_gradient()
    return gradients(case)


@CLASSES
@pytest.mark.parametrize("method", ["__init__", "clone", "adapt"])
def test_signature_begins_as_learn2learns(method: str, cls: type) -> None:
    ours = list(inspect.signature(getattr(cls, method)).parameters.values())
    theirs = list(inspect.signature(getattr(MAML, method)).parameters.values())
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    assert len(ours) >= len(theirs) and all(p.kind == p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert issubclass(cls, MAML) and cls.forward is MAML.forward


@EVERY
def test_a_clone_keeps_class_and_settings(make: Callable[..., Any]) -> None:
    parent = make(nn.Linear(4, 3), LR)
    parent.note = ["kept"]
    clone = parent.clone().clone(first_order=True, allow_unused=True, allow_nograd=True)
    assert type(clone) is type(parent) and clone.note is parent.note and clone.lr == LR
    assert clone.first_order and clone.allow_unused and clone.allow_nograd
    assert not parent.allow_unused and not parent.allow_nograd
    assert clone.out_features == 3 and clone.module.weight is not parent.module.weight
    assert torch.equal(clone.module.weight, parent.module.weight)
    clone.extra = 1
    assert not hasattr(parent, "extra")


@EVERY
@pytest.mark.parametrize("name", ["anil mlp", "maml cnn"])
def test_a_loop_over_losses_equals_a_closure(name: str, make: Callable[..., Any]) -> None:
    case = make_case(name)
    parent = make(case.module, LR)
    one, other = parent.clone(), parent.clone()
    one.adapt(support_loss(one, case), steps=4)
    loss = support_loss(other, case)
    for _ in range(4):
        other.adapt(loss())
    assert all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))
    found = []
    for learner in (one, other):
        query_loss(learner, case).backward()
        found.append([g.clone() for g in gradients(case)])
        for leaf in [*case.module.parameters(), *case.theta]:
            leaf.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("make", [UnrolledMAML, Learn2LearnMAML, LEARNERS["first order"]])
def test_a_clone_of_an_adapted_clone_goes_on_from_it(make: Callable[..., Any]) -> None:
    case = make_case("anil mlp")
    expected = outer_gradients(make(case.module, LR), case, 5)
    expected = [g.clone() for g in expected]
    learner = make(case.module, LR).clone()
    learner.adapt(support_loss(learner, case), steps=2)
    for leaf in [*case.module.parameters(), *case.theta]:
        leaf.grad = None
    outer_step(learner, case, 3)
    assert relative_error(gradients(case), expected) < 1e-12


@pytest.mark.parametrize("make", [LEARNERS["adam"], LEARNERS["reptile adam"]])
def test_an_optimizers_state_begins_anew_in_a_clone(make: Callable[..., Any]) -> None:
    case = make_case("anil mlp")
    learner = make(case.module, LR).clone()
    learner.adapt(support_loss(learner, case), steps=3)
    fresh = make(copy.deepcopy(case.module), LR)
    fresh.load_state_dict(learner.state_dict())
    ends = []
    for parent in (learner, fresh):
        clone = parent.clone()
        clone.adapt(support_loss(clone, case), steps=2)
        ends.append(values(clone))
    assert relative_error(*ends) < 1e-14


@EVERY
def test_state_dict(make: Callable[..., Any]) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    theirs, ours, twin = MAML(module, LR), make(copy.deepcopy(module), LR), make(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), LR
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(key.startswith("module.") for key in ours.state_dict())
    twin.load_state_dict(ours.clone().state_dict())
    assert all(torch.equal(a, b) for a, b in zip(values(twin), values(ours), strict=True))
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("cls", [UnrolledMAML, Learn2LearnMAML])
@pytest.mark.parametrize("learned", [False, True])
def test_a_step_size_that_is_a_parameter(learned: bool, cls: type) -> None:
    """As in learn2learn it is then one of the learner's own, and never adapted."""
    case, control = make_case("anil mlp"), make_case("anil mlp")
    parent = cls(case.module, nn.Parameter(torch.tensor(LR), requires_grad=learned))
    outer_step(parent, case, 3)
    outer_step(MAMLWithClosure(control.module, parent.lr.item()), control, 3)
    assert relative_error(gradients(case), gradients(control)) < 1e-12
    assert (parent.lr.grad is not None) == learned
    assert set(parent.state_dict()) == {"lr", *MAML(case.module, LR).state_dict()}


class MAMLWithClosure(MAML):
    """learn2learn's class, whose clone is driven by a loop."""

    def clone(self) -> Any:
        learner = super().clone()
        step = learner.adapt
        learner.adapt = lambda loss, steps: [step(loss()) for _ in range(steps)]
        return learner


@EVERY
def test_without_gradients(make: Callable[..., Any]) -> None:
    """The same values, parameters that are leaves, and no trace of the task anywhere."""
    case = make_case("anil mlp")
    parent = make(case.module, LR)
    control = parent.clone()
    control.adapt(support_loss(control, case), steps=4)
    with torch.no_grad():
        learner = parent.clone()
        learner.adapt(support_loss(learner, case), steps=4)
        assert not query_loss(learner, case).requires_grad
    assert relative_error(values(learner), values(control)) < 1e-14
    assert all(p.is_leaf and p.requires_grad for p in learner.module.parameters())
    query_loss(learner, case).backward()
    assert all(p.grad is None for p in case.module.parameters())


@EVERY
def test_a_clone_made_without_gradients_can_adapt_with_them(make: Callable[..., Any]) -> None:
    case = make_case("anil mlp")
    with torch.no_grad():
        learner = make(case.module, LR).clone()
    learner.adapt(support_loss(learner, case), steps=2)
    query_loss(learner, case).backward()
    assert all(p.grad is None for p in case.module.parameters()) and case.theta[0].grad.any()


@EVERY
def test_tasks_accumulate(make: Callable[..., Any]) -> None:
    case = make_case("anil mlp")
    parent = make(case.module, LR)
    one = [g.clone() for g in outer_gradients(parent, case)]
    learner = outer_step(parent, case, 3)
    if isinstance(learner, Reptile):
        learner.outer_gradient()
    assert relative_error(gradients(case), [2 * g for g in one]) < 1e-12


@EVERY
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_parent(way: str, make: Callable[..., Any]) -> None:
    case = make_case("maml mlp")
    parent = make(case.module, LR)
    expected = [g.clone() for g in outer_gradients(parent, case)]
    parent.zero_grad()
    twin = copy.deepcopy(parent) if way == "deepcopy" else pickle.loads(pickle.dumps(parent))
    copied = Case(twin.module, case.net, (), case.support, case.query)
    found = outer_gradients(twin, copied)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(p.grad is None or not p.grad.any() for p in parent.parameters())


@EVERY
def test_frozen_parameters_stay(make: Callable[..., Any]) -> None:
    case = make_case("anil mlp")
    case.module[2].weight.requires_grad_(False)
    learner = outer_step(make(case.module, LR, allow_nograd=True), case, 3)
    frozen = learner.module[2].weight
    assert torch.equal(frozen, case.module[2].weight) and not frozen.requires_grad
    assert case.module[2].weight.grad is None
    assert not torch.equal(learner.module[0].weight, case.module[0].weight)


@EVERY
def test_unused_parameters_stay(make: Callable[..., Any]) -> None:
    module = nn.ModuleDict({"idle": nn.Linear(2, 2), "used": nn.Linear(4, 3)})
    learner = make(module, LR, allow_unused=True).clone()
    x, y = torch.randn(9, 4), torch.arange(9) % 3
    learner.adapt(lambda: F.cross_entropy(learner.module["used"](x), y), steps=3)
    assert torch.equal(learner.module["idle"].weight, module["idle"].weight)
    assert not torch.equal(learner.module["used"].weight, module["used"].weight)


class Shared(nn.Module):
    """One weight by two names, and an RNN."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.rnn, self.last = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x)))).unsqueeze(1).expand(-1, 2, -1)
        return self.last(self.rnn(x)[0][:, -1])


@EVERY
def test_shared_and_recurrent_parameters(make: Callable[..., Any]) -> None:
    parent = make(Shared(), 0.01)
    learner, x, y = parent.clone(), torch.randn(9, 4), torch.arange(9) % 3
    before = F.cross_entropy(learner(x), y)
    learner.adapt(lambda: F.cross_entropy(learner(x), y), steps=3)
    assert learner.module.second.weight is learner.module.first.weight
    after = F.cross_entropy(learner(x), y)
    assert float(after.detach()) < float(before.detach())
    (slope,) = torch.autograd.grad(after, learner.module.rnn.weight_hh_l0)
    assert slope.any() and len(list(learner.module.parameters())) == 9


@EVERY
def test_batch_norm_buffers_are_shared_with_the_parent(make: Callable[..., Any]) -> None:
    case = make_case("maml cnn")
    control = copy.deepcopy(case.module)
    learner = MAML(control, LR).clone()
    learner.adapt(support_loss(learner, case)())
    ours = make(case.module, LR).clone()
    ours.adapt(support_loss(ours, case)())
    assert ours.module[1].running_mean is case.module[1].running_mean
    assert torch.equal(case.module[1].running_mean, control[1].running_mean)
    assert int(case.module[1].num_batches_tracked) == 1
