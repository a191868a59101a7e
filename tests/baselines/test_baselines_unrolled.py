"""The unrolled hypergradients against computations that share no code with them."""

from collections.abc import Callable
from typing import Any

import baseline_oracles
import higher  # noqa: F401  (these tests need the extra "baselines")
import pytest
import torch
from baseline_oracles import CASES, UPDATES, first_order, gradients, make_case, outer_step, unrolled
from oracles import relative_error, slope_at_zero
from torch import nn
from torch.func import grad

from l2l_implicit.baselines import Learn2LearnMAML, UnrolledMAML

from learn2learn.algorithms import MetaSGD  # isort: skip  (after l2l_implicit, which repairs it)

LR = 0.3
ENGINES = pytest.mark.parametrize("engine", [UnrolledMAML, Learn2LearnMAML])
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Differentiable RMSprop"),
]
OPTIMIZERS = {
    "sgd": "sgd",
    "adam": "adam",
    "rmsprop": "rmsprop",
    "momentum": lambda ps: torch.optim.SGD(ps, lr=7.0, momentum=0.9, weight_decay=0.1),
}
RATES = {"sgd": 0.3, "momentum": 0.3, "adam": 0.05, "rmsprop": 0.02}


@ENGINES
@pytest.mark.parametrize("name, steps, cached", [
    *((name, steps, True) for name in CASES for steps in (1, 3, 5)), ("anil mlp", 3, False),
])  # fmt: skip
@pytest.mark.parametrize("oracle", [unrolled, first_order])
def test_maml_and_anil_and_in_first_order(
    name: str, steps: int, cached: bool, oracle: Callable, engine: type
) -> None:
    """And the step size's gradient, of second order."""
    case, lr = make_case(name), torch.tensor(LR, requires_grad=True)
    phi, theta, *of_lr = oracle(case, LR, steps)
    outer_step(engine(case.module, lr, first_order=oracle is first_order), case, steps, cached)
    found = gradients(case, lr) if of_lr else gradients(case)
    assert relative_error(found, [*phi, *theta, *of_lr]) < 1e-12


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["anil linear", "anil mlp"])
def test_itd_bio_is_equation_3(name: str, cached: bool) -> None:
    """The whole path's derivative with a constant start; as published, with the backbone run again
    at each inner step, and not."""
    case = make_case(name)
    outer_step(UnrolledMAML(case.module, LR, learn_init=False), case, 5, cached)
    assert relative_error([case.theta[0].grad], unrolled(case, LR, 5)[1]) < 1e-12
    assert all(p.grad is None for p in case.module.parameters())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("kind", list(UPDATES))
def test_optimizers_with_a_learned_step_size(kind: str, each: bool, name: str) -> None:
    """One, or one for each entry of each parameter, whose gradients are that of the one together.
    """
    case, rate = make_case(name), RATES[kind]
    if name == "maml cnn":  # batch norm hides its bias: a gradient of rounding errors
        case.module[0].bias.requires_grad_(False)
    phi, theta, step_size = unrolled(case, rate, 4, UPDATES[kind])
    if name == "maml cnn":
        phi = (phi[0], torch.zeros_like(phi[1]), *phi[2:])
    lr = torch.tensor(rate, requires_grad=True)
    lrs = [torch.full_like(p, rate).requires_grad_() for p in case.module.parameters()]
    parent = UnrolledMAML(
        case.module, lrs if each else lr, allow_nograd=True, optimizer=OPTIMIZERS[kind]
    )
    outer_step(parent, case, 4)
    found = [s.grad.sum() for s in (lrs if each else [lr]) if s.grad is not None]
    assert relative_error([sum(found)], [step_size]) < 1e-9
    assert relative_error(gradients(case), [*phi, *theta]) < 1e-9


def biases_first(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """In groups, as for weight decay on the weights alone."""
    groups = [[p for p in parameters if (p.dim() < 2) is few] for few in (True, False)]
    return torch.optim.SGD([{"params": group} for group in groups], lr=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", biases_first])
@pytest.mark.parametrize("second_order", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_meta_sgd_is_learn2learns(name: str, second_order: bool, optimizer: Any) -> None:
    case = make_case(name)
    twin = case.twin()
    lrs = [LR * torch.randn_like(p) for p in case.module.parameters()]  # of both signs
    ours = UnrolledMAML(
        case.module, nn.ParameterList(lrs), first_order=not second_order, optimizer=optimizer
    )
    outer_step(ours, case, 3)
    leaves = nn.ParameterList(lr.clone() for lr in lrs)
    theirs = MetaSGD(twin.module, lrs=leaves, first_order=not second_order).clone()
    for _ in range(3):
        theirs.adapt(baseline_oracles.support_loss(theirs, twin)())
    baseline_oracles.query_loss(theirs, twin).backward()
    found = [*gradients(case), *(lr.grad for lr in ours.lr)]
    assert all(lr.grad.any() for lr in ours.lr)
    assert relative_error(found, [*gradients(twin), *(lr.grad for lr in leaves)]) < 1e-12


@pytest.mark.parametrize("kind", list(UPDATES))
@pytest.mark.parametrize("most", [None, 0.05, 1e9])
def test_first_order_of_every_optimizer(kind: str, most: float | None) -> None:
    """Momentum, second moments and weight decay are constants like the gradients they come of;
    clipped, and not."""
    case, rate = make_case("anil mlp"), RATES[kind]
    update = UPDATES[kind] if most is None else clipped(UPDATES[kind], most)
    phi, theta = first_order(case, rate, 4, update)
    settings = {"optimizer": OPTIMIZERS[kind], "clip_norm": most}
    outer_step(UnrolledMAML(case.module, rate, first_order=True, **settings), case, 4)
    assert relative_error(gradients(case), [*phi, *theta]) < 1e-12


def test_adam_where_a_gradient_is_zero() -> None:
    """The square root's derivative at 0 is infinite; a dead unit must not make it nan."""
    case = make_case("anil mlp")
    case.module[1] = nn.ReLU()
    with torch.no_grad():
        case.module[0].bias[0] = -100.0
    outer_step(UnrolledMAML(case.module, 0.05, optimizer="adam"), case, 3)
    found = gradients(case)
    assert all(g.isfinite().all() for g in found) and found[0][1:].any()
    assert not found[0][0].any()


def clipped(update: Callable, most: float) -> Callable:
    """The oracle's update on a gradient whose norm is cut off at ``most``."""

    def take(phi: tuple, g: tuple, state: object, lr: object, k: int) -> tuple:
        size = sum((d * d).sum() for d in g) ** 0.5
        return update(phi, tuple(d * (most / size).clamp_max(1.0) for d in g), state, lr, k)

    return take


def norms(case: baseline_oracles.Case, rate: float, update: Callable) -> list[float]:
    """Of the inner gradients of four steps."""
    points = baseline_oracles.path(case, case.start(), case.constants(), rate, 4, update)[:-1]
    gradients = [grad(case.inner)(phi, case.constants()) for phi in points]
    return [float(sum((d * d).sum() for d in g) ** 0.5) for g in gradients]


@pytest.mark.parametrize("kind", list(UPDATES))
def test_clipped_gradients_by_finite_differences(kind: str) -> None:
    """Some of the four are clipped and some are not; the step size is learned too."""
    case, rate = make_case("anil mlp"), RATES[kind]
    sizes = sorted(norms(case, rate, UPDATES[kind]))
    most = 0.5 * (sizes[1] + sizes[2])
    update = clipped(UPDATES[kind], most)
    lengths = norms(case, rate, update)
    assert min(lengths) < 0.999 * most and 1.001 * most < max(lengths), "no case of both"
    lr = torch.tensor(rate, requires_grad=True)
    settings = {"optimizer": OPTIMIZERS[kind], "clip_norm": most}
    outer_step(UnrolledMAML(case.module, lr, **settings), case, 4)
    start, theta = case.start(), case.constants()
    directions = [torch.randn_like(t) for t in (*start, *theta)]

    def value(t: float) -> torch.Tensor:
        moved = [p + t * d for p, d in zip((*start, *theta), directions, strict=True)]
        phi, of_features = tuple(moved[:-1]), tuple(moved[-1:])
        end = rate * (1 + t)
        return baseline_oracles.query_loss_after(case, phi, of_features, end, 4, update)

    pairs = zip(gradients(case), directions, strict=True)
    found = sum((g * d).sum() for g, d in pairs) + rate * lr.grad
    assert relative_error([found], [slope_at_zero(value, 1e-4)]) < 1e-7


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
def test_clip_norms_that_cannot_be(wrong: float) -> None:
    with pytest.raises(ValueError, match="^clip_norm: expected a[^\n]*$"):
        UnrolledMAML(make_case("maml mlp").module, 0.05, clip_norm=wrong)
