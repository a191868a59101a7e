"""The unrolled hypergradients against computations that share no code with them."""

from collections.abc import Callable

import higher  # noqa: F401  (these tests need the extra "baselines")
import pytest
import torch
from baseline_oracles import (
    CASES,
    UPDATES,
    Case,
    equation_3,
    first_order,
    gradients,
    make_case,
    outer_step,
    unrolled,
)
from oracles import relative_error
from torch import nn

from l2l_implicit.baselines import Learn2LearnMAML, UnrolledMAML

LR = 0.3
ENGINES = pytest.mark.parametrize("engine", [UnrolledMAML, Learn2LearnMAML])
STEPS = pytest.mark.parametrize("steps", [1, 3, 5])
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
@STEPS
@pytest.mark.parametrize("oracle", [unrolled, first_order])
@pytest.mark.parametrize("name", CASES)
def test_maml_and_anil_and_in_first_order(
    name: str, oracle: Callable, steps: int, engine: type
) -> None:
    """And the step size's gradient, of second order."""
    case, lr = make_case(name), torch.tensor(LR, requires_grad=True)
    phi, theta, *of_lr = oracle(case, LR, steps)
    outer_step(engine(case.module, lr, first_order=oracle is first_order), case, steps)
    found = gradients(case, lr) if of_lr else gradients(case)
    assert relative_error(found, [*phi, *theta, *of_lr]) < 1e-12


@STEPS
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", ["anil linear", "anil mlp"])
def test_itd_bio_is_equation_3(name: str, cached: bool, steps: int) -> None:
    """Also with the backbone run again at each inner step, as published."""
    case = make_case(name)
    outer_step(UnrolledMAML(case.module, LR, learn_init=False), case, steps, cached)
    assert relative_error([case.theta[0].grad], [equation_3(case, LR, steps)]) < 1e-12
    assert all(p.grad is None for p in case.module.parameters())


@ENGINES
@pytest.mark.parametrize("second_order", [True, False])
def test_features_run_again_at_each_step(second_order: bool, engine: type) -> None:
    case = make_case("anil mlp")
    outer_step(engine(case.module, LR, first_order=not second_order), case, 3, cached=False)
    oracle = unrolled if second_order else first_order
    phi, theta, *_ = oracle(case, LR, 3)
    assert relative_error(gradients(case), [*phi, *theta]) < 1e-12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", list(UPDATES))
def test_optimizers_with_a_learned_step_size(kind: str, name: str) -> None:
    case, rate = make_case(name), RATES[kind]
    if name == "maml cnn":  # batch norm hides its bias: a gradient of rounding errors
        case.module[0].bias.requires_grad_(False)
    phi, theta, step_size = _without_bias(case, unrolled(case, rate, 4, UPDATES[kind]))
    lr = torch.tensor(rate, requires_grad=True)
    parent = UnrolledMAML(case.module, lr, allow_nograd=True, optimizer=OPTIMIZERS[kind])
    outer_step(parent, case, 4)
    assert relative_error([lr.grad], [step_size]) < 1e-9
    assert relative_error(gradients(case), [*phi, *theta]) < 1e-9


def _without_bias(case: Case, found: tuple) -> tuple:
    """The oracle's answer where the parameters that are frozen are constants."""
    phi, theta, step_size = found
    pairs = zip(phi, case.module.parameters(), strict=True)
    return [g if p.requires_grad else torch.zeros_like(g) for g, p in pairs], theta, step_size


@pytest.mark.parametrize("kind", list(UPDATES))
def test_first_order_of_every_optimizer(kind: str) -> None:
    """Momentum, second moments and weight decay are constants like the gradients they come of."""
    case, rate = make_case("anil mlp"), RATES[kind]
    phi, theta = first_order(case, rate, 4, UPDATES[kind])
    parent = UnrolledMAML(case.module, rate, first_order=True, optimizer=OPTIMIZERS[kind])
    outer_step(parent, case, 4)
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
