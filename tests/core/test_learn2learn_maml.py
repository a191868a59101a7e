"""What learn2learn's own tests ask of MAML, asked of `ImplicitMAML` and, as control, of MAML."""

import copy

import pytest
import torch
from oracles import peak_of_live_tensors
from torch import Tensor, nn

from l2l_implicit import ImplicitCGHead, ImplicitMAML

from learn2learn.algorithms import MAML  # isort: skip  (after l2l_implicit, which repairs it)

LR = 0.01
CLASSES = pytest.mark.parametrize("cls", [MAML, ImplicitMAML])
pytestmark = pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.Sigmoid(), nn.Linear(20, 20)]
    network = nn.Sequential(*layers, nn.Softmax(dim=1))
    network.register_buffer("dummy", torch.zeros(2, 2))
    return network


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(7, 10)


def norms(module: nn.Module) -> list[float]:
    return [float(p.grad.norm()) for p in module.parameters()]


@CLASSES
def test_clones_compute_what_the_model_does(cls: type, model: nn.Module, x: Tensor) -> None:
    parent = cls(model, LR)
    outputs = [parent.clone()(x) for _ in range(3)]
    assert all(torch.equal(out, model(x)) for out in outputs)


@pytest.mark.parametrize("cls", [MAML, ImplicitMAML, ImplicitCGHead])
def test_first_order_gradient_is_that_at_the_adapted_values(
    cls: type, model: nn.Module, x: Tensor
) -> None:
    learner = cls(model, LR, first_order=True).clone()
    for _ in range(3):
        learner.adapt(learner(x).norm(p=2))
    learner(x).norm(p=2).backward()

    reference = copy.deepcopy(model)
    for p, adapted in zip(reference.parameters(), learner.parameters(), strict=True):
        p.data = adapted.detach().clone()
        p.grad = None
    reference(x).norm(p=2).backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert float((ours.grad - theirs.grad).norm()) < 1e-8


@CLASSES
def test_the_graph_reaches_every_parameter(cls: type, model: nn.Module, x: Tensor) -> None:
    cls(model, LR).clone()(x).norm(p=2).backward()
    assert all(norm > 0 for norm in norms(model))


@CLASSES
def test_a_step_lowers_the_loss_and_leaves_a_gradient(
    cls: type, model: nn.Module, x: Tensor
) -> None:
    parent = cls(model, LR)
    learner = parent.clone()
    before = learner(x).norm(p=2)
    learner.adapt(before)
    after = learner(x).norm(p=2)
    assert float(after) <= float(before)
    after.backward()
    assert all(norm > 0 for norm in norms(model))
    assert torch.equal(parent.module.dummy, learner.module.dummy)


@CLASSES
def test_parameters_absent_from_the_loss(cls: type, model: nn.Module) -> None:
    learner = cls(model, LR, allow_unused=True).clone()

    def every_second() -> Tensor:
        return torch.stack([p.norm() for p in list(learner.parameters())[::2]]).sum()

    learner.adapt(every_second())
    every_second().backward()
    assert all(p.grad is not None for p in list(model.parameters())[::2])


@CLASSES
@pytest.mark.parametrize("where", ["adapt", "constructor", "clone"])
def test_parameters_without_grad(cls: type, where: str, model: nn.Module, x: Tensor) -> None:
    model[2].weight.requires_grad = False
    frozen, flag = model[2].weight.clone(), {"allow_nograd": True}
    parent = cls(model, LR, **(flag if where == "constructor" else {}))
    learner = parent.clone(**(flag if where == "clone" else {}))
    loss = learner(x).norm(p=2)
    if where == "adapt":
        with pytest.raises((RuntimeError, ValueError, UnboundLocalError)):
            learner.adapt(loss)
    learner.adapt(loss, **(flag if where == "adapt" else {}))
    learner(x).norm(p=2).backward()
    for p in model.parameters():
        assert (p.grad is None) == (p is model[2].weight)
    assert torch.equal(learner.module[2].weight, frozen)
    assert not learner.module[2].weight.requires_grad


class TwoPaths(nn.Module):
    """One submodule, reachable by two names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.direct, self.nested = inner, nn.ModuleDict({"again": inner, "own": nn.Linear(3, 3)})


@CLASSES
def test_shared_modules(cls: type) -> None:
    torch.manual_seed(0)
    parent = cls(TwoPaths(nn.Linear(4, 3)), LR)
    learner = parent.clone()
    count = len(list(parent.parameters()))
    for _ in range(3):
        learner.adapt(torch.stack([p.norm(p=2) for p in learner.parameters()]).sum())
    assert len(list(learner.parameters())) == count == 4
    assert learner.module.direct.weight is learner.module.nested["again"].weight
    torch.stack([p.norm(p=2) for p in learner.parameters()]).sum().backward()
    assert all(p.grad is not None for p in parent.parameters())


@CLASSES
def test_memory_of_repeated_adaptation(cls: type, model: nn.Module, x: Tensor) -> None:
    """Task after task, nothing is left of the one before."""
    parent = cls(model, LR)

    def tasks(count: int) -> None:
        for _ in range(count):
            learner = parent.clone()
            for _ in range(5):
                learner.adapt(learner(x).norm(p=2))
            learner(x).norm(p=2).backward()
            parent.zero_grad()

    tasks(1)
    few = max(peak_of_live_tensors(lambda: tasks(2)) for _ in range(3))
    assert peak_of_live_tensors(lambda: tasks(20)) < 1.05 * few
