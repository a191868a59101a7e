"""Reptile's outer gradient against steps taken by hand."""

import pytest
import torch
from baseline_oracles import Case, Tensors, make_case, momentum, path, support_loss
from oracles import relative_error
from small_task import HOWS, adapt
from torch import Tensor

from l2l_implicit.baselines import Reptile

pytestmark = pytest.mark.usefixtures("float64")
CASES = ["maml linear", "maml mlp", "maml cnn"]


def way(case: Case, adapted: Tensors) -> list[Tensor]:
    return [initial - after for initial, after in zip(case.start(), adapted, strict=True)]


def nichols_adam(phi: Tensors, g: Tensors, state: Tensors, lr: float, k: int) -> tuple:
    """Adam with betas 0 and 0.999, epsilon beside the corrected root, as torch has it."""
    v = tuple(0.999 * a + 0.001 * d**2 for a, d in zip(state or (0.0,) * len(g), g, strict=True))
    roots = [(a / (1 - 0.999**k)).sqrt() + 1e-8 for a in v]
    return tuple(p - lr * d / r for p, d, r in zip(phi, g, roots, strict=True)), v


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 5])
@HOWS
def test_plain_steps(how: str, steps: int, name: str) -> None:
    case = make_case(name)
    adapted = path(case, case.start(), (), 0.3, steps)[-1]
    learner = Reptile(case.module, 0.3).clone()
    loss = support_loss(learner, case)
    adapt(learner, loss, how, steps)
    learner.outer_gradient()
    assert relative_error([p.grad for p in case.module.parameters()], way(case, adapted)) < 1e-12
    assert relative_error(list(learner.module.parameters()), adapted) < 1e-12


OPTIMIZERS = {
    "momentum": (momentum, lambda ps: torch.optim.SGD(ps, momentum=0.9, weight_decay=0.1)),
    "adam": (nichols_adam, lambda ps: torch.optim.Adam(ps, betas=(0.0, 0.999))),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_inner_optimizers_begin_anew_in_every_clone(kind: str) -> None:
    update, optimizer = OPTIMIZERS[kind]
    case = make_case("maml mlp")
    adapted = path(case, case.start(), (), 0.02, 4, update)[-1]
    parent = Reptile(case.module, 0.02, optimizer=optimizer)
    for _ in range(2):
        learner = parent.clone()
        learner.adapt(support_loss(learner, case), steps=4)
        assert relative_error(list(learner.module.parameters()), adapted) < 1e-12


@HOWS
def test_every_step_is_one_under_autocast(how: str) -> None:
    """Which keeps a copy of the weights in low precision, of before the step."""
    torch.manual_seed(0)
    x, y, found = torch.randn(6, 3).float(), torch.arange(6) % 2, []
    module = torch.nn.Linear(3, 2).float()
    before = torch.nn.functional.cross_entropy(module(x), y)
    for cache in (True, False):
        learner = Reptile(module, 0.5).clone()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = lambda n=learner: torch.nn.functional.cross_entropy(n(x).float(), y)  # noqa: E731
            adapt(learner, loss, how, 6)
            found.append(loss())
    assert torch.equal(*found) and found[0] < 0.95 * before


def test_weights_and_tasks_add_up() -> None:
    case = make_case("maml linear")
    parent = Reptile(case.module, 0.3)
    before = [p.clone() for p in case.start()]
    for weight, steps in ((0.25, 2), (0.5, 4)):
        learner = parent.clone().clone()
        learner.adapt(support_loss(learner, case), steps=steps)
        assert all(torch.equal(a, b) for a, b in zip(case.start(), before, strict=True))
        learner.outer_gradient(weight)
    ends = path(case, case.start(), (), 0.3, 4)
    pairs = zip(way(case, ends[2]), way(case, ends[4]), strict=True)
    expected = [0.25 * a + 0.5 * b for a, b in pairs]
    assert relative_error([p.grad for p in case.module.parameters()], expected) < 1e-12


def test_frozen_parameters_get_no_outer_gradient() -> None:
    case = make_case("maml mlp")
    case.module[0].weight.requires_grad_(False)
    learner = Reptile(case.module, 0.3, allow_nograd=True).clone()
    learner.adapt(support_loss(learner, case), steps=3)
    learner.outer_gradient()
    assert [p.grad is None for p in case.module.parameters()] == [True, False, False, False]
    assert torch.equal(learner.module[0].weight, case.module[0].weight)
