"""A second derivative that is wrong or missing is said; one that is right is never doubted.

That no problem of `problems.py` is doubted is checked in test_hypergradient.py, by every way of
adapting.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from small_task import HOWS, adapt
from torch import Tensor, nn

from l2l_implicit import GradientDescent, ImplicitCGHead, Newton, UnsolvedWarning
from l2l_implicit.inner_solvers.protocol import InnerSolver

pytestmark = pytest.mark.usefixtures("float64")
Y = torch.arange(12) % 3
SOLVERS = [Newton(), GradientDescent(), GradientDescent(adaptive=True)]


class Halved(torch.autograd.Function):
    """tanh, whose second derivative is half of what it is."""

    @staticmethod
    def forward(ctx, inputs):
        out = inputs.tanh()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, gradient):
        (out,) = ctx.saved_tensors
        half = 0.5 * out + 0.5 * out.detach()
        return gradient * (1 - half.square())


class OnceDifferentiable(torch.autograd.Function):
    """tanh, whose derivative is a constant to autograd."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.factor = 1 - inputs.tanh().square()
        return inputs.tanh()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor


class Net(nn.Module):
    """Two layers with ``between`` them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 5), nn.Linear(5, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


WRONG = {"halved": Halved.apply, "once differentiable": OnceDifferentiable.apply}
RIGHT = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "softplus": F.softplus, "sine": torch.sin}


def warned(learner: ImplicitCGHead, x: Tensor, how: str) -> list[str]:
    """What one task warns of the second derivative."""

    def loss() -> Tensor:
        return F.cross_entropy(learner(x), Y)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnsolvedWarning)
        adapt(learner, loss, how, 20)
    return [str(w.message) for w in caught if "second derivative" in str(w.message)]


def run(between: Callable[[Tensor], Tensor], inner: InnerSolver, how: str, lr: float) -> list[str]:
    learner = ImplicitCGHead(Net(between), lr, anchor="init", inner=inner).clone()
    return warned(learner, torch.randn(12, 4), how)


@HOWS
@pytest.mark.parametrize("inner", SOLVERS, ids=repr)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_one_is_said(name: str, inner: InnerSolver, how: str) -> None:
    runs = 4 if how == "closure" else 10
    found = [run(WRONG[name], inner, how, lr=0.3) for _ in range(runs)]
    assert all(len(each) <= 1 for each in found)
    # Losses show it only where the steps are short enough to tell; a closure always does.
    assert sum(map(len, found)) >= (runs if how == "closure" else runs // 2)


@HOWS
@pytest.mark.parametrize("inner", SOLVERS, ids=repr)
@pytest.mark.parametrize("lr", [0.03, 1.0])
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_one_is_never_doubted(name: str, lr: float, inner: InnerSolver, how: str) -> None:
    assert not any(run(RIGHT[name], inner, how, lr) for _ in range(3))


@HOWS
def test_one_loss_does_not_speak_for_another(how: str) -> None:
    """A learner that has seen a right one still looks at a wrong one, and once at each."""
    net, x, said = Net(torch.tanh), torch.randn(12, 4), []
    parent = ImplicitCGHead(net, 0.3, anchor="init", inner=GradientDescent())
    for between in (torch.tanh, OnceDifferentiable.apply, OnceDifferentiable.apply):
        learner = parent.clone()
        learner.module.between = between
        said.append(len(warned(learner, x, how)))
    assert said == [0, 1, 0]
