"""learn2learn's models, layers and transforms as feature extractors."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit, linear, minimize, polish, relative_error
from small_task import HOWS, adapt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from l2l_implicit import CG, ImplicitCGHead, ImplicitGBML, Newton

import learn2learn as l2l  # isort: skip  (after l2l_implicit, which repairs it)

models = l2l.vision.models
WAYS, LABELS, L2 = 3, torch.arange(6) % 3, 0.3
EXACT = {"l2": L2, "inner": Newton(200, 1e-13), "linear": CG(200, 1e-13)}
pytestmark = pytest.mark.usefixtures("float64")

KFO = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)


def _layers() -> nn.Module:
    """What learn2learn.nn has: a Kronecker-factored layer, a scale, functions."""
    rows = l2l.nn.Lambda(lambda x: x.mean(1).mean(1)[:, :6].reshape(-1, 2, 3))
    return nn.Sequential(rows, l2l.nn.KroneckerLinear(2, 3), l2l.nn.Scale((2, 3)), l2l.nn.Flatten())


def _transformed(transform: Callable[[Tensor], nn.Module]) -> nn.Module:
    """A convolution whose weight goes through a transform of learn2learn.optim."""
    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", transform(conv.weight), unsafe=True)
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


RESNET = functools.partial(models.ResNet12, avg_pool=False, wider=False, dropblock_size=2)
BACKBONES: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the side of the images
    "CNN4": (lambda: models.CNN4(WAYS, hidden_size=8, embedding_size=32).features, 32),
    "ResNet12": (lambda: RESNET(WAYS).features, 32),
    "learn2learn.nn": (_layers, 8),
    "Kronecker": (lambda: _transformed(KFO), 6),
    "meta-curvature": (lambda: _transformed(l2l.optim.MetaCurvatureTransform), 6),
}


def loss(phi: Tensor, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(linear(phi, h, WAYS), y)


def objectives(h: Tensor, h_query: Tensor) -> tuple[Callable, Callable]:
    """The inner and the outer one of a linear head, as functions of phi and the features."""

    def inner(phi: Tensor, h: Tensor, h_query: Tensor) -> Tensor:
        return loss(phi, h, LABELS) + 0.5 * L2 * phi.square().sum()

    return inner, lambda phi, h, h_query: loss(phi, h_query, LABELS.roll(1))


def expected(features: Tensor, leaves: list[Tensor], head: nn.Linear) -> list[Tensor]:
    """The theorem gives the features' gradients, ordinary autograd those of the leaves.

    Features beyond the samples' span are handled by an orthogonal basis: 12 numbers for each.
    """
    _, _, basis = torch.linalg.svd(features.detach(), full_matrices=False)
    low = [part.detach() @ basis.t() for part in features.split(6)]
    inner, outer = objectives(*low)
    found = flat([head.weight @ basis.t(), head.bias])
    phi = polish(inner, found, low)
    assert relative_error([found], [phi]) < 1e-8
    gradient = torch.cat(implicit(inner, outer, low, phi)) @ basis
    return list(torch.autograd.grad(features, leaves, gradient, allow_unused=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_hypergradient(name: str) -> None:
    make, side = BACKBONES[name]
    backbone = make()
    images = torch.rand(12, 3, side, side)
    features = backbone(images)
    learner = ImplicitCGHead(nn.Linear(features.shape[1], WAYS), 0.1, **EXACT).clone()
    for _ in range(20):
        learner.adapt(F.cross_entropy(learner(features[:6]), LABELS))
    loss = F.cross_entropy(learner(features[6:]), LABELS.roll(1))
    leaves = list(backbone.parameters())
    got = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    pairs = list(zip(got, expected(features, leaves, learner.module), strict=True))
    assert all((g is None) == (e is None) for g, e in pairs)
    assert relative_error(*zip(*(p for p in pairs if p[0] is not None), strict=True)) < 1e-8


# Transforms as the metric of the regulariser.


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
