"""Memory does not grow with the number of inner steps."""

from collections.abc import Callable
from typing import Any

import higher  # noqa: F401  (these tests need the extra "baselines")
import pytest
import torch
import torch.nn.functional as F
from oracles import peak_of_live_tensors
from small_task import HOWS, adapt
from torch import nn

from experiments.training.peak_memory import peak_memory
from l2l_implicit import (
    CG,
    GaussNewton,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    Newton,
    Perturbed,
)
from l2l_implicit.baselines import Learn2LearnMAML, Reptile, UnrolledMAML
from l2l_implicit.inner_solvers.protocol import InnerSolver

# After l2l_implicit, which repairs it.
from learn2learn.algorithms import MAML  # isort: skip
from learn2learn.vision.models import CNN4Backbone  # isort: skip

MIB = 2**20
Y = torch.arange(10) % 5
HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(2000, 5),
    # Large against what a step keeps beside the linearization; small enough for many steps.
    "two layers": lambda: nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 5)),
    # Two million parameters.
    "large": lambda: nn.Sequential(nn.Linear(2000, 1000), nn.Tanh(), nn.Linear(1000, 5)),
}
pytestmark = pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def task(parent: nn.Module, how: str, steps: int, grad: bool = True) -> Callable[[], None]:
    """One task with features that have history: adapt, then back-propagate the query loss."""
    width = next(parent.parameters()).shape[1]
    theta, data = torch.randn(8, width, requires_grad=True), torch.randn(10, 8)

    def run() -> None:
        with torch.set_grad_enabled(grad):
            learner, h = parent.clone(), torch.tanh(data @ theta)
            adapt(learner, lambda: F.cross_entropy(learner(h), Y), how, steps)
            loss = F.cross_entropy(learner(h), Y)
            if grad:
                loss.backward()
        for leaf in (theta, *parent.parameters()):
            leaf.grad = None

    return run


def peaks(parent: nn.Module, how: str, *numbers: int, grad: bool = True) -> list[int]:
    """The peak of a task at each of these numbers of inner steps."""
    task(parent, how, 2, grad)()  # what is allocated once and for all
    return [peak_memory(task(parent, how, steps, grad)) for steps in numbers]


def test_the_measure_knows_an_allocation() -> None:
    def two_then_one() -> None:
        pair = torch.empty(3 * MIB // 4), torch.empty(MIB // 4)
        del pair
        torch.empty(2 * MIB // 4)

    assert peak_of_live_tensors(two_then_one) == peak_memory(two_then_one) == 4 * MIB


@pytest.mark.parametrize("head, many", [
    ("linear", 300), ("two layers", 100), ("large", 10),
    *(pytest.param(head, 1000, marks=pytest.mark.slow) for head in ("two layers", "large")),
])  # fmt: skip
@pytest.mark.parametrize("inner", [Newton(3), GradientDescent()])
@HOWS
def test_flat_in_the_steps(how: str, inner: InnerSolver, head: str, many: int) -> None:
    """In ten steps an unrolled learner would hold ten times as much."""
    perturbed = (head, how, inner, many) == ("two layers", "closure", GradientDescent(), 100)
    for linear in (CG(3), *([Perturbed(steps=3)] if perturbed else [])):
        parent = ImplicitCGHead(HEADS[head](), 0.01, l2=0.5, inner=inner, linear=linear)
        one, end = peaks(parent, how, 1, many)
        assert end < 1.02 * one


@pytest.mark.parametrize("cls, settings", [
    (Learn2LearnMAML, {}), (Reptile, {}), (UnrolledMAML, {}), (UnrolledMAML, {"learn_init": False}),
    (UnrolledMAML, {"optimizer": "adam"}),
    (UnrolledMAML, {"optimizer": lambda parameters: torch.optim.SGD(
        parameters, lr=1.0, momentum=0.9, weight_decay=0.01)}),
])  # fmt: skip
def test_baselines_are_flat_without_gradients_and_in_first_order(cls: type, settings: Any) -> None:
    for grad in (False, True):
        parent = cls(HEADS["two layers"](), 0.001, first_order=grad, **settings)
        few, many = peaks(parent, "closure", 2, 200, grad=grad)
        assert many < 1.01 * few


@pytest.mark.parametrize("cls", [MAML, UnrolledMAML, Learn2LearnMAML])
def test_the_measure_sees_an_unrolled_history(cls: type) -> None:
    """The control: it grows by about a gradient a step."""
    one, ten = peaks(cls(HEADS["large"](), 0.01), "loss", 1, 10)
    assert ten > 1.5 * one


def test_a_step_of_imaml_takes_two_and_a_half_gradients() -> None:
    """On a convolutional network with batch statistics, whatever the numbers of steps."""
    network = nn.Sequential(CNN4Backbone(hidden_size=64), nn.Linear(256, 5))
    x, y = torch.randn(25, 3, 32, 32), torch.arange(25) % 5

    def gradient() -> None:
        F.cross_entropy(network(x), y).backward()

    def step(steps: int, products: int) -> Callable[[], None]:
        parent = ImplicitMAML(
            network, 0.01, linear=CG(products, tol=1e-12), curvature=GaussNewton()
        )

        def run() -> None:
            learner = parent.clone()
            learner.adapt(lambda: F.cross_entropy(learner(x), y), steps=steps)
            F.cross_entropy(learner(x), y).backward()

        return run

    gradient()  # leaves the gradients' own memory behind
    step(1, 1)()
    one = peak_memory(gradient)
    found = [peak_memory(step(k, n)) for k, n in ((1, 1), (5, 1), (1, 8))]
    assert max(found) <= 2.5 * one
    assert max(found) <= 1.01 * min(found)
