"""learn2learn's transforms as the metric of the regulariser."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import implicit, linear, minimize, relative_error
from small_task import HOWS, adapt
from torch import Tensor, nn

from l2l_implicit import CG, ImplicitGBML, Newton

import learn2learn as l2l  # isort: skip  (after l2l_implicit, which repairs it)

WAYS, LABELS, L2 = 3, torch.arange(6) % 3, 0.3
EXACT = {"l2": L2, "inner": Newton(200, 1e-13), "linear": CG(200, 1e-13)}
pytestmark = pytest.mark.usefixtures("float64")

KFO = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)


def loss(phi: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(linear(phi, h, WAYS), y)


def kronecker_metric(phi: Tensor, factors: list[Tensor], h: Tensor) -> Tensor:
    """(l2/2) |T phi|^2 written out: T multiplies by L'L on the left and by R'R on the right."""
    weight, bias = phi.split([WAYS * h.shape[1], WAYS])
    parts = (weight.view(WAYS, -1), *factors[:2]), (bias.view(-1, 1), *factors[2:])
    return 0.5 * L2 * sum((a.t() @ a @ v @ b.t() @ b).square().sum() for v, a, b in parts)


@HOWS
def test_a_learned_kronecker_metric(how: str) -> None:
    h, h_query = torch.randn(6, 4).requires_grad_(), torch.randn(6, 4)
    gbml = ImplicitGBML(nn.Linear(4, WAYS), KFO, lr=0.1, **EXACT)
    factors = list(gbml.compute_update.parameters())
    with torch.no_grad():
        for factor in factors:
            factor.add_(0.2 * torch.randn_like(factor))
    learner = gbml.clone()
    adapt(learner, lambda: F.cross_entropy(learner(h), LABELS), how, 20)
    F.cross_entropy(learner(h_query), LABELS.roll(1)).backward()

    def inner(phi: Tensor, h: Tensor, *factors: Tensor) -> Tensor:
        return loss(phi, h, LABELS) + kronecker_metric(phi, list(factors), h)

    leaves = [h, *factors]
    phi = minimize(inner, torch.zeros(WAYS * 5), leaves, 0.1)
    theory = implicit(inner, lambda phi, *theta: loss(phi, h_query, LABELS.roll(1)), leaves, phi)
    assert relative_error([p.grad for p in leaves], theory) < 1e-8
    assert all(bool(p.grad.any()) for p in factors)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in gbml.module.parameters())


def test_only_some_parameters_adapt() -> None:
    head = nn.Linear(4, WAYS)
    head.bias.requires_grad_(False)
    gbml = ImplicitGBML(head, KFO, 0.1, allow_nograd=True, **EXACT)
    learner, h = gbml.clone(), torch.randn(6, 4)
    learner.adapt(lambda: F.cross_entropy(learner(h), LABELS), steps=20)
    F.cross_entropy(learner(h), LABELS.roll(1)).backward()
    weight, bias = gbml.compute_update.transforms_modules
    assert bool(weight.transform.left.grad.any()) and bias.transform.left.grad is None


@pytest.mark.parametrize("settings, error, message", [
    ({"transform": KFO, "adapt_transform": True}, ValueError, "adapt_transform: expected False"),
    ({}, TypeError, "transform: expected one of learn2learn.optim"),
    ({"compute_update": "x"}, TypeError, "compute_update: expected learn2learn's, got str"),
    ({"compute_update": l2l.optim.ParameterUpdate([nn.Linear(4, 3).weight], KFO)}, ValueError,
     "compute_update: expected one made for the module's 2"),
])  # fmt: skip
def test_settings_that_have_no_meaning_here(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        learner = ImplicitGBML(nn.Linear(4, 3), lr=0.1, **settings).clone()
        learner.adapt(F.cross_entropy(learner(torch.randn(6, 4)), LABELS))
