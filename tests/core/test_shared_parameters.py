"""Parameters shared between the head and the features: right, or an error.

The head's weight W also makes the features, h = tanh(x W'). Whose W that is decides the problem:
the parent's (the features keep the value from before the task) or the learner's own (they adapt).
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import implicit, minimize, relative_error
from torch import Tensor, nn

from l2l_implicit import CG, ImplicitCGHead, Newton

pytestmark = pytest.mark.usefixtures("float64")

LABELS, L2 = torch.arange(8) % 4, 0.3
EXACT = {"l2": L2, "inner": Newton(200, 1e-13), "linear": CG(200, 1e-13)}


@pytest.fixture
def parent(float64: None) -> ImplicitCGHead:
    return ImplicitCGHead(nn.Linear(4, 4, bias=False), 0.5, **EXACT)


@pytest.fixture
def inputs(float64: None) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4), torch.randn(8, 4)


def features(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight.t())


def expected(parent: ImplicitCGHead, inputs: tuple[Tensor, Tensor], adapts: bool) -> Tensor:
    """The gradient in W by the implicit function theorem; whether the features adapt with phi."""
    x, x_query = inputs
    weight = parent.module.weight

    def loss(phi: Tensor, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        own = phi.view(4, 4)
        return F.cross_entropy(features(x, own if adapts else theta) @ own.t(), y)

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        return loss(phi, theta, x, LABELS) + 0.5 * L2 * phi.square().sum()

    def outer(phi: Tensor, theta: Tensor) -> Tensor:
        return loss(phi, theta, x_query, LABELS.roll(1))

    phi = minimize(inner, weight.detach().reshape(-1), [weight], 0.5)
    return implicit(inner, outer, [weight], phi)[0]


def adapt(learner: ImplicitCGHead, loss: Callable[[], Tensor], how: str) -> None:
    adapt(learner, loss, how, 40)


def query_loss(learner: ImplicitCGHead, h: Tensor) -> Tensor:
    return F.cross_entropy(learner(h), LABELS.roll(1))


@pytest.mark.parametrize("how", ["loss", "closure"])
@pytest.mark.parametrize("whose", ["parent's", "clone's"])
def test_features_made_before_the_task(
    whose: str, how: str, parent: ImplicitCGHead, inputs: tuple[Tensor, Tensor]
) -> None:
    learner = parent.clone()
    weight = (parent if whose == "parent's" else learner).module.weight
    h, h_query = (features(x, weight) for x in inputs)
    adapt(learner, lambda: F.cross_entropy(learner(h), LABELS), how)
    query_loss(learner, h_query).backward()
    assert relative_error([parent.module.weight.grad], [expected(parent, inputs, False)]) < 1e-8


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_features_that_adapt_with_the_head(
    how: str, parent: ImplicitCGHead, inputs: tuple[Tensor, Tensor]
) -> None:
    """Then all of W is phi, and nothing of it theta: its initial value has no influence."""
    scale = torch.ones((), requires_grad=True)
    learner, (x, x_query) = parent.clone(), inputs

    def h(x: Tensor) -> Tensor:
        return features(scale * x, learner.module.weight)

    adapt(learner, lambda: F.cross_entropy(learner(h(x)), LABELS), how)
    query_loss(learner, h(x_query)).backward()
    assert torch.equal(parent.module.weight.grad, torch.zeros(4, 4))

    def loss(phi: Tensor, scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
        own = phi.view(4, 4)
        return F.cross_entropy(features(scale * x, own) @ own.t(), y)

    def inner(phi: Tensor, scale: Tensor) -> Tensor:
        return loss(phi, scale, x, LABELS) + 0.5 * L2 * phi.square().sum()

    def outer(phi: Tensor, scale: Tensor) -> Tensor:
        return loss(phi, scale, x_query, LABELS.roll(1))

    start = learner.module.weight.detach().reshape(-1)  # of several minima, the learner's
    phi = minimize(inner, start, [scale], 0.5)
    assert relative_error([scale.grad], implicit(inner, outer, [scale], phi)) < 1e-8


@pytest.mark.parametrize("factor", [1.0, None])
def test_features_kept_from_a_closures_first_call(
    factor: float | None, parent: ImplicitCGHead, inputs: tuple[Tensor, Tensor]
) -> None:
    """They depend on the parameters of one inner step, from where no gradient finds its way."""
    learner, kept = parent.clone(), []

    def loss() -> Tensor:
        if not kept:
            kept.append(features(inputs[0], learner.module.weight))
        value = F.cross_entropy(learner(kept[0]), LABELS)
        return value if factor is None else factor * value

    learner.adapt(loss, steps=40)
    total = query_loss(learner, features(inputs[1], parent.module.weight))
    with pytest.raises(RuntimeError, match="kept from one of its calls"):
        total.backward()


@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize("what", ["outputs", "parameters"])
def test_a_query_loss_kept_from_a_closures_last_call(
    what: str, factor: float | None, parent: ImplicitCGHead, inputs: tuple[Tensor, Tensor]
) -> None:
    learner, kept = parent.clone(), {}
    h, h_query = (features(x, parent.module.weight) for x in inputs)

    def loss() -> Tensor:
        kept["outputs"] = learner(h_query)
        kept["parameters"] = h_query @ learner.module.weight.t()
        value = F.cross_entropy(learner(h), LABELS)
        return value if factor is None else factor * value

    learner.adapt(loss, steps=40)
    with pytest.raises(RuntimeError, match="kept from one of its calls"):
        F.cross_entropy(kept[what], LABELS).backward()


def test_what_a_closure_keeps_without_its_history_is_data(
    parent: ImplicitCGHead, inputs: tuple[Tensor, Tensor]
) -> None:
    learner, kept = parent.clone(), []

    def loss() -> Tensor:
        kept.append(features(inputs[0], learner.module.weight).detach())
        return F.cross_entropy(learner(kept[0]), LABELS)

    learner.adapt(loss, steps=40)
    query_loss(learner, features(inputs[1], parent.module.weight)).backward()
    assert bool(parent.module.weight.grad.isfinite().all())


def test_parameters_adapted_without_a_graph_can_be_trained_on(
    parent: ImplicitCGHead, inputs: tuple[Tensor, Tensor]
) -> None:
    """A learner adapted under no_grad() is a model like any other."""
    learner, (x, x_query) = parent.clone(), inputs
    with torch.no_grad():
        learner.adapt(lambda: F.cross_entropy(learner(x), LABELS), steps=5)
    query_loss(learner, x_query).backward()
    assert bool(learner.module.weight.grad.any())
