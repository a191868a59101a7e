"""Memory does not grow with the number of inner steps."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import peak_of_live_tensors
from small_task import adapt
from torch import Tensor, nn

from experiments.training.peak_memory import peak_memory
from l2l_implicit import CG, GradientDescent, ImplicitCGHead, Newton
from l2l_implicit.inner_solvers.protocol import InnerSolver

from learn2learn.algorithms import MAML  # isort: skip  (after l2l_implicit, which repairs it)

MIB = 2**20
Y = torch.arange(10) % 5


def test_the_measure_knows_an_allocation() -> None:
    def two_then_one() -> None:
        pair = torch.empty(3 * MIB // 4), torch.empty(MIB // 4)
        del pair
        torch.empty(2 * MIB // 4)

    assert peak_of_live_tensors(two_then_one) == peak_memory(two_then_one) == 4 * MIB


def test_two_measures_agree_on_a_task() -> None:
    """The counter of storages against the allocator's own record, which takes gigabytes."""
    torch.manual_seed(0)
    one = task(head(large_head(), GradientDescent()), 2000, "loss", 2)
    one()
    assert peak_memory(one) == pytest.approx(peak_of_live_tensors(one), rel=0.02)


def task(parent: nn.Module, width: int, how: str, steps: int) -> Callable[[], object]:
    """One task with features that have history: adapt, then back-propagate the query loss."""
    theta, data = torch.randn(8, width, requires_grad=True), torch.randn(10, 8)

    def run() -> None:
        learner, h = parent.clone(), torch.tanh(data @ theta)

        def loss() -> Tensor:
            return F.cross_entropy(learner(h), Y)

        adapt(learner, loss, how, steps)
        F.cross_entropy(learner(h), Y).backward()
        for leaf in (theta, *parent.parameters()):
            leaf.grad = None

    return run


def growth(parent: nn.Module, width: int, how: str, many: int) -> float:
    """Peak at ``many`` steps over the peak at one."""
    task(parent, width, how, 2)()  # what is allocated once and for all
    one = peak_memory(task(parent, width, how, 1))
    return peak_memory(task(parent, width, how, many)) / one


def linear_head() -> nn.Module:
    return nn.Linear(2000, 5)


def small_head() -> nn.Module:
    """Large against what a step keeps beside the linearization; small enough for 1000 steps."""
    return nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 5))


def large_head() -> nn.Module:
    """Two million parameters."""
    return nn.Sequential(nn.Linear(2000, 1000), nn.Tanh(), nn.Linear(1000, 5))


def head(module: nn.Module, inner: InnerSolver) -> ImplicitCGHead:
    return ImplicitCGHead(module, 0.01, inner=inner, linear=CG(3), l2=0.5)


WAYS = [(inner, how) for inner in (Newton(3), GradientDescent()) for how in ("loss", "closure")]


@pytest.mark.parametrize("inner, how", WAYS)
def test_linear_head_from_1_to_1000_steps(inner: InnerSolver, how: str) -> None:
    torch.manual_seed(0)
    assert growth(head(linear_head(), inner), 2000, how, 1000) < 1.02


@pytest.mark.parametrize("inner, how", WAYS)
@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_large_head_from_1_to_10_steps(inner: InnerSolver, how: str) -> None:
    """In ten steps an unrolled learner would hold ten times as much."""
    torch.manual_seed(0)
    assert growth(head(large_head(), inner), 2000, how, 10) < 1.02


@pytest.mark.parametrize("inner, how", WAYS[2:])
@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_large_head_from_1_to_1000_steps(inner: InnerSolver, how: str) -> None:
    torch.manual_seed(0)
    assert growth(head(large_head(), inner), 2000, how, 1000) < 1.02


@pytest.mark.parametrize("inner, how", WAYS)
@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_two_layers_from_1_to_1000_steps(inner: InnerSolver, how: str) -> None:
    torch.manual_seed(0)
    assert growth(head(small_head(), inner), 200, how, 1000) < 1.02


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_the_measure_sees_what_learn2learn_keeps() -> None:
    """The control: an unrolled learner does grow, by about a gradient a step."""
    torch.manual_seed(0)
    assert growth(MAML(large_head(), 0.01), 2000, "loss", 10) > 1.5


def test_many_tasks_in_turn_hold_no_more_than_one() -> None:
    """Many tasks one after the other: nothing piles up between them."""
    torch.manual_seed(0)
    parent = head(linear_head(), Newton(3))
    one = task(parent, 2000, "loss", 5)

    def many() -> None:
        for _ in range(20):
            one()

    one()
    assert peak_of_live_tensors(many) < 1.02 * peak_of_live_tensors(one)
