"""Heads other than a linear one on images, each against the implicit function theorem."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracles import implicit, polish, relative_error
from small_task import adapt
from torch import Tensor, nn
from torch.func import functional_call, grad

from l2l_implicit import CG, ImplicitCGHead, Newton
from l2l_implicit.tasks import get_tasksets

pytestmark = pytest.mark.usefixtures("float64")
EXACT = {"inner": Newton(300, 1e-13), "linear": CG(300, 1e-13)}
L2, WORDS = 1.0, 30


class Case(NamedTuple):
    """Features of given inputs, a head on them, and a loss."""

    backbone: nn.Module
    head: nn.Module
    inputs: tuple[Tensor, Tensor]  # support, query
    targets: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def _sine() -> Case:
    """Ten support and ten query points of one sinusoid, as the tasks of this name give them."""
    x, y = (part.double() for part in get_tasksets("sine", train_samples=20).train.sample())
    backbone = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 6), nn.Tanh())
    return Case(backbone, nn.Linear(6, 1), (x[:10], x[10:]), (y[:10], y[10:]), F.mse_loss)


def _labels() -> tuple[Tensor, Tensor]:
    return torch.arange(12) % 3, torch.arange(9) % 3


def _text() -> Case:
    """Documents as lists of word numbers: the mean of their words' vectors, a linear head."""
    words = torch.randint(WORDS, (12, 7)), torch.randint(WORDS, (9, 7))
    return Case(MeanVector(WORDS, 5), nn.Linear(5, 3), words, _labels(), F.cross_entropy)


def _tabular(head: nn.Module) -> Case:
    """Precomputed columns; of the features only their scales are learned."""
    columns = torch.randn(12, 5), torch.randn(9, 5)
    return Case(Scales(5), head, columns, _labels(), F.cross_entropy)


class MeanVector(nn.Embedding):
    """The mean of a document's word vectors."""

    def forward(self, words: Tensor) -> Tensor:
        return super().forward(words).mean(1)


class Scales(nn.Module):
    """One learned factor for each column."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(1 + 0.1 * torch.randn(columns))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


class WrittenOut(nn.Module):
    """A normalisation by its formula: torch.func's second derivatives of torch's are off by 1 %."""

    def __init__(self, norm: nn.BatchNorm1d | nn.LayerNorm) -> None:
        super().__init__()
        self.dim, self.eps = 0 if isinstance(norm, nn.BatchNorm1d) else 1, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(self.dim, keepdim=True)
        variance = centered.square().mean(self.dim, keepdim=True)
        return centered / (variance + self.eps).sqrt() * self.weight + self.bias


def _deep(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), *between, nn.Tanh(), nn.Linear(6, 3))


CASES: dict[str, Callable[[], Case]] = {
    "sine": _sine,
    "text": _text,
    "tabular": lambda: _tabular(nn.Linear(5, 3)),
    "multi-layer": lambda: _tabular(_deep()),
    "layer norm": lambda: _tabular(_deep(nn.LayerNorm(6))),
    "batch norm": lambda: _tabular(_deep(nn.BatchNorm1d(6))),
    "batch norm in eval mode": lambda: _tabular(_deep(nn.BatchNorm1d(6)).eval()),
    "convolution": lambda: _tabular(
        nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3))
    ),
}


def expected(case: Case, found: Tensor, anchored: bool) -> list[Tensor]:
    """The hypergradients of the backbone's parameters and of the head's initial values."""
    names = dict(case.backbone.named_parameters())
    head = copy.deepcopy(case.head)
    for name, module in head.named_children():
        if module.training and isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            setattr(head, name, WrittenOut(module))
    shapes = {name: p.shape for name, p in head.named_parameters()}

    def loss(part: int, phi: Tensor, theta: tuple[Tensor, ...]) -> Tensor:
        features = functional_call(
            case.backbone, dict(zip(names, theta, strict=False)), (case.inputs[part],)
        )
        pieces = phi.split([shape.numel() for shape in shapes.values()])
        own = {n: p.view(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        return case.loss(functional_call(head, own, (features,)), case.targets[part])

    def inner(phi: Tensor, *theta: Tensor) -> Tensor:
        start = torch.cat([p.reshape(-1) for p in theta[len(names) :]])
        offset = phi - start if anchored else phi
        return loss(0, phi, theta) + 0.5 * L2 * offset.square().sum()

    leaves = [*names.values(), *case.head.parameters()]
    phi = polish(inner, found, leaves)  # of several minima, the learner's
    assert float(grad(inner)(phi, *leaves).detach().norm()) < 1e-11
    return implicit(inner, lambda phi, *theta: loss(1, phi, theta), leaves, phi)


@pytest.mark.parametrize("how", ["loss", "closure"])
@pytest.mark.parametrize("name", CASES)
def test_hypergradient(name: str, how: str) -> None:
    case, anchored = CASES[name](), name != "sine"
    parent = ImplicitCGHead(
        case.head, 0.1, l2=L2, anchor="init" if anchored else "zero", **EXACT
    )
    learner = parent.clone()
    support, query = (case.backbone(x) for x in case.inputs)

    def loss() -> Tensor:
        return case.loss(learner(support), case.targets[0])

    adapt(learner, loss, how, 40)
    case.loss(learner(query), case.targets[1]).backward()
    found = torch.cat([p.detach().reshape(-1) for p in learner.parameters()])
    leaves = [*case.backbone.parameters(), *case.head.parameters()]
    assert relative_error([p.grad for p in leaves], expected(case, found, anchored)) < 1e-8
    assert parent.diagnostics.unsolved == 0
