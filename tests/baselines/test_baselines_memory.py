"""What the baselines keep: nothing without gradients, no second-order graph in first order."""

from collections.abc import Callable
from typing import Any

import higher  # noqa: F401  (these tests need the extra "baselines")
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.training.peak_memory import peak_memory
from l2l_implicit.baselines import Learn2LearnMAML, Reptile, UnrolledMAML

SETTINGS: dict[str, Callable[..., Any]] = {
    "sgd": UnrolledMAML,
    "itd": lambda *args, **kw: UnrolledMAML(*args, learn_init=False, **kw),
    "adam": lambda *args, **kw: UnrolledMAML(*args, optimizer="adam", **kw),
    "momentum": lambda *args, **kw: UnrolledMAML(*args, optimizer=momentum, **kw),
    "learn2learn": Learn2LearnMAML,
    "reptile": Reptile,
}


def momentum(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=0.01)


def growth(make: Callable[..., Any], many: int, gradients: bool, **settings: Any) -> float:
    """The peak of a task of ``many`` steps over that of two; features with history."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 5))
    parent = make(head, 0.001, **settings)
    theta, x, y = torch.randn(300, requires_grad=True), torch.randn(5, 300), torch.arange(5)

    def task(steps: int) -> None:
        with torch.set_grad_enabled(gradients):
            learner = parent.clone()
            h = x * theta
            learner.adapt(lambda: F.cross_entropy(learner(h), y), steps=steps)
            loss = F.cross_entropy(learner(h), y)
            if gradients:
                loss.backward()
        for leaf in (theta, *head.parameters()):
            leaf.grad = None

    task(2)
    few = peak_memory(lambda: task(2))
    return peak_memory(lambda: task(many)) / few


@pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS.keys())
def test_flat_without_gradients_and_in_first_order(make: Callable[..., Any]) -> None:
    assert growth(make, 200, gradients=False) < 1.01
    assert growth(make, 200, gradients=True, first_order=True) < 1.01


@pytest.mark.parametrize("make", [UnrolledMAML, Learn2LearnMAML])
def test_the_measure_sees_an_unrolled_history(make: Callable[..., Any]) -> None:
    assert growth(make, 20, gradients=True) > 2
