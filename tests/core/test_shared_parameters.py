"""Parameters shared between the head and the features: right, or an error.

The head's weight W also makes the features, h = tanh(x W'). Whose W that is decides the problem:
the parent's (the features keep the value from before the task) or the learner's own (they adapt).
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit, polish, relative_error
from problems import EXACT
from small_task import HOWS, adapt
from torch import Tensor, nn

from l2l_implicit import ImplicitCGHead

pytestmark = pytest.mark.usefixtures("float64")

LABELS, L2 = torch.arange(8) % 4, 0.3
Inputs = tuple[Tensor, Tensor]  # support, query


@pytest.fixture
def parent(float64: None) -> ImplicitCGHead:
    return ImplicitCGHead(nn.Linear(4, 4, bias=False), 0.5, l2=L2, **EXACT)


@pytest.fixture
def inputs(float64: None) -> Inputs:
    return torch.randn(8, 4), torch.randn(8, 4)


def features(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight.t())


Made = Callable[[Tensor, Tensor, Tensor], Tensor]  # features of phi, theta and inputs


def expected(theta: Tensor, phi: Tensor, inputs: Inputs, made: Made) -> Tensor:
    """By the implicit function theorem, at the minimum next to ``phi``."""

    def loss(phi: Tensor, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        own = phi.view(4, 4)
        return F.cross_entropy(made(own, theta, x) @ own.t(), y)

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        return loss(phi, theta, inputs[0], LABELS) + 0.5 * L2 * phi.square().sum()

    def outer(phi: Tensor, theta: Tensor) -> Tensor:
        return loss(phi, theta, inputs[1], LABELS.roll(1))

    return implicit(inner, outer, [theta], polish(inner, phi, [theta]))[0]


def query_loss(learner: ImplicitCGHead, h: Tensor) -> Tensor:
    return F.cross_entropy(learner(h), LABELS.roll(1))


@HOWS
@pytest.mark.parametrize("whose", ["parent's", "clone's"])
def test_features_made_before_the_task(
    whose: str, how: str, parent: ImplicitCGHead, inputs: Inputs
) -> None:
    learner, theta = parent.clone(), parent.module.weight
    weight = (parent if whose == "parent's" else learner).module.weight
    h, h_query = (features(x, weight) for x in inputs)
    adapt(learner, lambda: F.cross_entropy(learner(h), LABELS), how, 40)
    query_loss(learner, h_query).backward()
    phi = flat(learner.module.parameters())
    right = expected(theta, phi, inputs, lambda phi, theta, x: features(x, theta))
    assert relative_error([theta.grad], [right]) < 1e-8


@HOWS
def test_features_that_adapt_with_the_head(
    how: str, parent: ImplicitCGHead, inputs: Inputs
) -> None:
    """Then all of W is phi, and nothing of it theta: its initial value has no influence."""
    scale, learner = torch.ones((), requires_grad=True), parent.clone()

    def h(x: Tensor) -> Tensor:
        return features(scale * x, learner.module.weight)

    adapt(learner, lambda: F.cross_entropy(learner(h(inputs[0])), LABELS), how, 40)
    query_loss(learner, h(inputs[1])).backward()
    assert torch.equal(parent.module.weight.grad, torch.zeros(4, 4))
    phi = flat(learner.module.parameters())
    right = expected(scale, phi, inputs, lambda phi, scale, x: features(scale * x, phi))
    assert relative_error([scale.grad], [right]) < 1e-8


@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize("what", ["features", "outputs", "parameters"])
def test_what_is_kept_from_a_closures_call(
    what: str, factor: float | None, parent: ImplicitCGHead, inputs: Inputs
) -> None:
    """Features of its first or a query loss of its last: they depend on the parameters of one inner
    step, from where no gradient finds its way."""
    learner, kept = parent.clone(), {}
    h, h_query = (features(x, parent.module.weight) for x in inputs)

    def loss() -> Tensor:
        if "features" not in kept:
            kept["features"] = features(inputs[0], learner.module.weight)
        kept["outputs"] = learner(h_query)
        kept["parameters"] = h_query @ learner.module.weight.t()
        x = kept["features"] if what == "features" else h
        value = F.cross_entropy(learner(x), LABELS)
        return value if factor is None else factor * value

    learner.adapt(loss, steps=40)
    kept["features"] = learner(h_query)
    with pytest.raises(RuntimeError, match="kept from one of its calls"):
        F.cross_entropy(kept[what], LABELS).backward()


def test_what_a_closure_keeps_without_its_history_is_data(
    parent: ImplicitCGHead, inputs: Inputs
) -> None:
    learner, kept = parent.clone(), []

    def loss() -> Tensor:
        kept.append(features(inputs[0], learner.module.weight).detach())
        return F.cross_entropy(learner(kept[0]), LABELS)

    learner.adapt(loss, steps=40)
    query_loss(learner, features(inputs[1], parent.module.weight)).backward()
    assert bool(parent.module.weight.grad.isfinite().all())
