"""Which losses are known to be those of a linear head, and that every loss is right either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit, polish, relative_error
from problems import on_vector, two_layers
from small_task import HOWS, adapt
from torch import Tensor, nn

import l2l_implicit.learner as learner_module
from l2l_implicit import CG, GradientDescent, ImplicitCGHead, Newton
from l2l_implicit.inner_problem.losses import CrossEntropy, OutputLoss, SquaredError
from l2l_implicit.inner_problem.recognition import recognize

pytestmark = pytest.mark.usefixtures("float64")

M, WIDTH, CLASSES = 12, 4, 3
Y = torch.arange(M) % CLASSES
ROUNDING = 1e-13
SOLVED = 3  # a seed from which Newton's method reaches a minimum in a few steps
EXACT: dict[str, Any] = {
    "inner": Newton(cg_steps=200, tol=1e-14),
    "linear": CG(steps=200, tol=1e-13),
}

# One loss, read in both ways


def squared(outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    targets = F.one_hot(labels, CLASSES).to(outputs.dtype)
    return F.mse_loss(outputs, targets, reduction=reduction)


FUNCTIONS: dict[type[OutputLoss], Callable[..., Tensor]] = {
    CrossEntropy: F.cross_entropy,
    SquaredError: squared,
}


# Which losses are recognised, and that every answer is right either way

Net = Callable[[Tensor], Tensor]
Loss = Callable[[Net, Tensor], Tensor]  # of net and features
CE, MSE, EYE = F.cross_entropy, F.mse_loss, torch.eye(CLASSES, dtype=torch.float64)[Y]
NUMBERS = torch.linspace(-1, 1, M * CLASSES, dtype=torch.float64).view(M, CLASSES)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
ONES = torch.ones(WIDTH, CLASSES, dtype=torch.float64)


def spatial(net: Net, x: Tensor) -> Tensor:
    """Logits [batch, classes, places]: a two-dimensional kind of nll_loss."""
    return CE(net(x.view(4, 3, WIDTH)).transpose(1, 2), Y.view(4, 3))


def plain(net: Net, x: Tensor) -> Tensor:
    return CE(net(x), Y)


def strong(net: Net, x: Tensor) -> Tensor:
    return 4.0 * CE(net(x), Y)


CASES: dict[str, tuple[Loss, bool | None]] = {  # and whether the closed form is used
    "plain": (plain, True),
    "one example": (lambda net, x: CE(net(x[:1]), Y[:1]), True),
    "rows repeated": (lambda net, x: CE(net(x[torch.arange(M) % 5]), Y), True),
    "numbers": (lambda net, x: MSE(net(x), NUMBERS), True),
    "summed numbers": (lambda net, x: MSE(net(x), EYE, reduction="sum"), True),
    "ignored absent": (lambda net, x: CE(net(x), Y % 2, ignore_index=2), None),
    "smooth": (lambda net, x: CE(net(x), Y, label_smoothing=0.1), False),
    "weighted": (lambda net, x: CE(net(x), Y, weight=WEIGHTS), False),
    "ignored negative": (lambda net, x: CE(net(x), torch.where(Y == 1, -100, Y)), False),
    "ignored in range": (lambda net, x: CE(net(x), Y, ignore_index=1), False),
    "ignored in a sum": (lambda net, x: CE(net(x), Y, ignore_index=1, reduction="sum"), False),
    "three-dimensional": (lambda net, x: CE(net(x.view(4, 3, WIDTH)).flatten(0, 1), Y), False),
    "spatial": (spatial, False),
    "probabilities": (lambda net, x: CE(net(x), EYE * 0.7 + 0.1), False),
    "scaled loss": (lambda net, x: 0.5 * CE(net(x), Y), False),
    "scaled logits": (lambda net, x: CE(1.5 * net(x), Y), False),
    "penalty": (lambda net, x: CE(net(x), Y) + 0.1 * net(x).square().mean(), False),
    "softmax over the examples": (
        lambda net, x: F.nll_loss(F.log_softmax(net(x), dim=0), Y), False),
    "unbatched": (lambda net, x: CE(net(x[0]), Y[0]), False),
    "strong": (strong, False),
    "numbers first, another graph": (lambda net, x: MSE(EYE, net(x)), False),
    "scaled numbers": (lambda net, x: 0.5 * MSE(net(x), EYE), False),
    "targets of theta": (lambda net, x: MSE(net(x), torch.tanh(x @ ONES)), False),
    "targets of phi": (lambda net, x: MSE(net(x), 0.3 * net(x.roll(1, 0)) + EYE), False),
    "one row of numbers": (lambda net, x: MSE(net(x[0]), EYE[1]), False),
    "one column of numbers": (lambda net, x: MSE(net(x)[:, 0], EYE[:, 0]), False),
    "numbers, broadcast": (
        lambda net, x: MSE(net(x).expand(2, M, CLASSES), torch.stack([EYE, NUMBERS])), False),
    "huber": (lambda net, x: F.huber_loss(net(x), EYE * 0.1, delta=10.0), False),
}  # fmt: skip


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the closed form was used, each time that it was asked for."""
    found: list[bool] = []

    def spy(*args: Any) -> Any:
        parts = recognize(*args)
        found.append(parts is not None)
        return parts

    monkeypatch.setattr(learner_module, "recognize", spy)
    return found


def error_of(
    head: nn.Module, loss: Loss, how: str, steps: int = 20, outside: bool = False
) -> float:
    """Of the hypergradient, against the oracle's."""
    theta, data, query = torch.randn(5, WIDTH).requires_grad_(), torch.randn(M, 5), torch.randn(6)
    learner = ImplicitCGHead(head, 0.1, l2=0.2, **EXACT).clone()
    x, net = torch.tanh(data @ theta), learner.module if outside else learner
    adapt(learner, lambda: loss(net, x), how, steps)
    (learner(x)[:6] * query[:, None]).square().mean().backward()

    def inner(phi: Tensor, t: Tensor) -> Tensor:
        value = loss(on_vector(head, phi), torch.tanh(data @ t))
        return value + 0.1 * phi.square().sum()

    def outer(phi: Tensor, t: Tensor) -> Tensor:
        outputs = on_vector(head, phi)(torch.tanh(data @ t))
        return (outputs[:6] * query[:, None]).square().mean()

    # The oracle starts where the learner ended: a head of two layers has more than one minimum.
    found = flat(learner.module.parameters())
    phi = polish(inner, found, [theta])
    assert relative_error([found], [phi]) < 1e-6
    return relative_error([theta.grad], implicit(inner, outer, [theta], phi))


@HOWS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_right(name: str, bias: bool, how: str, used: list[bool]) -> None:
    loss, closed = CASES[name]
    assert error_of(nn.Linear(WIDTH, CLASSES, bias), loss, how) < 1e-9
    assert closed is None or all(u is closed for u in used)


class Tied(nn.Module):
    """Logits ``tanh(x W') W'``: one weight, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight)


@HOWS
@pytest.mark.parametrize("name, make, loss", [
    ("two layers", lambda: two_layers(2, 2.0), strong), ("tied", Tied, strong),
    ("bypassing forward", lambda: nn.Linear(WIDTH, CLASSES), plain),
])  # fmt: skip
def test_what_is_not_taken_for_a_linear_head(
    name: str, make: Callable[[], nn.Module], loss: Loss, how: str, used: list[bool]
) -> None:
    torch.manual_seed(SOLVED)
    assert error_of(make(), loss, how, 40, outside="bypassing" in name) < 1e-8
    assert not any(used)


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "x @ w": lambda x, w, b: x @ w,
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "x.t().t() @ w.t()": lambda x, w, b: x.t().t() @ w.t(),
    "(w @ x.t()).t()": lambda x, w, b: (w @ x.t()).t(),
    "bias beta": lambda x, w, b: torch.addmm(b, x, w.t(), beta=2.0),
    "bias alpha": lambda x, w, b: torch.addmm(b, x, w.t(), alpha=3.0),
    "bias from w": lambda x, w, b: F.linear(x, w, w.sum(0) + b),
    "bias twice": lambda x, w, b: F.linear(x, w, b) + b,
    "bias sliced": lambda x, w, b: F.linear(x, w, b[:1].expand(WIDTH)),
    "w + 0": lambda x, w, b: F.linear(x, w + 0.0),
    "w scaled, bias": lambda x, w, b: F.linear(x, 2 * w, b),
    "in place": lambda x, w, b: F.linear(x, w).mul_(2.0),
}


class LinearModule(nn.Module):
    """A linear map in another spelling."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.weight, self.spelling = nn.Parameter(torch.randn(WIDTH, WIDTH)), SPELLINGS[spelling]
        self.bias = nn.Parameter(torch.randn(WIDTH)) if "bias" in spelling else None

    def forward(self, x: Tensor) -> Tensor:
        return self.spelling(x, self.weight, self.bias)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_a_linear_map(spelling: str) -> None:
    assert error_of(LinearModule(spelling), plain, "closure") < 1e-9


@pytest.mark.parametrize("leaf", [False, True])
def test_learner_fed_its_own_weight(leaf: bool) -> None:
    """Inputs that are phi: the logits ``W W'`` are no linear map of W. Closures make W a leaf."""
    learner = ImplicitCGHead(nn.Linear(WIDTH, WIDTH, bias=False), 0.1, l2=0.5).clone()
    if leaf:
        learner.module.weight = nn.Parameter(learner.module.weight.detach())
    w, y = learner.module.weight, torch.arange(WIDTH)
    dense = torch.func.grad(lambda w: F.cross_entropy(w @ w.t(), y))(w.detach())
    assert recognize(F.cross_entropy(learner(w), y), [w], set()) is None
    learner.inner, learner.lr = GradientDescent(), 1.0
    learner.adapt(lambda: F.cross_entropy(learner(learner.module.weight), y), steps=1)
    moved = w.detach() - dense - 0.5 * w.detach()
    assert relative_error([learner.module.weight], [moved]) < ROUNDING
