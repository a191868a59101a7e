"""learn2learn's contract, asked of every baseline, and what they promise beyond it."""

import copy
from collections.abc import Callable
from typing import Any

import higher  # noqa: F401  (these tests need the extra "baselines")
import pytest
import torch
from baseline_oracles import gradients, make_case, outer_step, query_loss, support_loss
from contract import *  # noqa: F403
from oracles import relative_error
from small_task import adapt
from torch import Tensor, nn

from l2l_implicit.baselines import Learn2LearnMAML, Reptile, UnrolledMAML

from learn2learn.algorithms import MAML  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = pytest.mark.usefixtures("float64")

LR = 0.05
LEARNERS: dict[str, Callable[..., Any]] = {
    "unrolled": UnrolledMAML,
    "first order": lambda *args, **kw: UnrolledMAML(*args, **{"first_order": True, **kw}),
    "itd": lambda *args, **kw: UnrolledMAML(*args, learn_init=False, **kw),
    "adam": lambda *args, **kw: UnrolledMAML(*args, optimizer="adam", **kw),
    "meta-sgd": lambda module, lr, **kw: UnrolledMAML(
        module, [torch.full_like(p, lr) for p in module.parameters()], **kw
    ),
    "learn2learn": Learn2LearnMAML,
    "reptile": Reptile,
    "reptile adam": lambda *args, **kw: Reptile(*args, optimizer="adam", **kw),
}


@pytest.fixture(params=LEARNERS.values(), ids=LEARNERS.keys())
def make(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param


def values(learner: Any) -> list[Tensor]:
    return [p.detach() for p in learner.module.parameters()]


@pytest.mark.parametrize("name", ["anil mlp", "maml cnn"])
def test_a_loop_over_losses_equals_a_closure(name: str, make: Callable[..., Any]) -> None:
    case, found = make_case(name), []
    parent = make(case.module, LR)
    for how in ("closure", "loss"):
        for leaf in [*case.module.parameters(), *case.theta]:
            leaf.grad = None
        learner = parent.clone()
        adapt(learner, support_loss(learner, case), how, 4)
        query_loss(learner, case).backward()
        found.append([*values(learner), *(g.clone() for g in gradients(case))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("make", [UnrolledMAML, Learn2LearnMAML, LEARNERS["first order"]])
def test_a_clone_of_an_adapted_clone_goes_on_from_it(make: Callable[..., Any]) -> None:
    case = make_case("anil mlp")
    outer_step(make(case.module, LR), case, 5)
    expected = [g.clone() for g in gradients(case)]
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


CHANGED: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    (UnrolledMAML, {"optimizer": "sgd"}, {"optimizer": "adam"}),
    (UnrolledMAML, {"clip_norm": 1e-3}, {"clip_norm": None}),
    (UnrolledMAML, {}, {"clip_norm": 1e-3}),
    (Reptile, {"optimizer": "adam"}, {"optimizer": "sgd"}),
]


@pytest.mark.parametrize("cls, first, then", CHANGED)
def test_a_setting_that_is_changed_is_used(cls: type, first: Any, then: Any) -> None:
    """By the steps from then on, with a state of their own."""
    case, ends = make_case("anil mlp"), []
    for late in (True, False):
        learner = cls(case.module, LR, **first).clone()
        learner.adapt(support_loss(learner, case), steps=1)
        for name, value in then.items():
            setattr(learner, name, value)
        learner = learner if late else learner.clone()
        learner.adapt(support_loss(learner, case), steps=3)
        ends.append(values(learner))
    assert relative_error(*ends) < 1e-14


@pytest.mark.parametrize("learned", [True, False])
def test_a_learned_start_may_be_changed(learned: bool) -> None:
    case = make_case("anil mlp")
    parent = UnrolledMAML(case.module, LR, learn_init=not learned)
    parent.learn_init = learned
    outer_step(parent, case, 2)
    assert all((p.grad is not None) == learned for p in case.module.parameters())


@pytest.mark.parametrize("cls", [UnrolledMAML, Learn2LearnMAML])
@pytest.mark.parametrize("learned", [False, True])
def test_a_step_size_that_is_a_parameter(learned: bool, cls: type) -> None:
    """As in learn2learn it is then one of the learner's own, and never adapted."""
    case, control = make_case("anil mlp"), make_case("anil mlp")
    parent = cls(case.module, nn.Parameter(torch.tensor(LR), requires_grad=learned))
    outer_step(parent, case, 3)
    outer_step(cls(control.module, LR), control, 3)
    assert relative_error(gradients(case), gradients(control)) < 1e-12
    assert (parent.lr.grad is not None) == learned
    assert set(parent.state_dict()) == {"lr", *MAML(case.module, LR).state_dict()}
