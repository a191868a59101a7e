"""One few-shot task, and one outer step on it: the floor's, the implicit head's, its peers'.

A step leaves gradients on theta. ``as published`` means: the backbone is run again at every inner
step, with its graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import higher
import learn2learn as l2l
import torch
from learn2learn.algorithms import MAML
from learn2learn.vision.models.cnn4 import ConvBlock
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy, linear

from experiments.ingredients.algorithm import solvers
from l2l_implicit import ImplicitCGHead
from l2l_implicit.baselines import UnrolledMAML

STEP_SIZE = 0.1
L2 = 0.1  # of the peers that carry a regulariser of their own


class Shape(NamedTuple):
    """What a task looks like: ``ways * (shots + queries)`` square images, a network for them."""

    network: str = "cnn4"  # a key of `NETWORKS`
    hidden: int = 64  # filters, where the network has a choice
    pixels: int = 32
    ways: int = 5
    shots: int = 5
    queries: int = 5

    @property
    def title(self) -> str:
        network = self.network.replace("cnn4", f"CNN4-{self.hidden}").replace("resnet", "ResNet")
        return (
            f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class, "
            f"{network}, {self.pixels} x {self.pixels}"
        )


class Problem(NamedTuple):
    """A task with its backbone; every method takes a copy of ``head``, equal at the start."""

    title: str
    backbone: nn.Module
    head: nn.Linear
    images: Tensor
    labels: Tensor
    split: int
    device: str

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        return self.images[: self.split], self.labels[: self.split]

    @property
    def query(self) -> tuple[Tensor, Tensor]:
        return self.images[self.split :], self.labels[self.split :]

    def new_head(self) -> nn.Linear:
        return copy.deepcopy(self.head)

    def whole(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.new_head())


def _group_norm(hidden: int) -> nn.Module:
    """CNN4 whose normalisation does not look at other images."""
    network = l2l.vision.models.CNN4Backbone(hidden_size=hidden)
    for block in network:
        block.normalize = nn.GroupNorm(max(1, hidden // 8), hidden)
    return network


def _wide(hidden: int) -> nn.Module:
    """CNN4 that pools once: ``hidden * (pixels / 2) ** 2`` features, 16,384 for 64 and 32."""
    blocks = [ConvBlock(3, hidden, (3, 3), max_pool=True)]
    for _ in range(3):
        blocks.append(ConvBlock(hidden, hidden, (3, 3), max_pool=False, max_pool_factor=0.5))
    return nn.Sequential(*blocks, nn.Flatten())


def _resnet12_wide(_: int) -> nn.Module:
    """ResNet12 without its last pooling: 16,000 features at 84 pixels."""
    network = l2l.vision.models.ResNet12Backbone(avg_pool=False)
    network.flatten = nn.Flatten()  # learn2learn's refuses channels_last
    return network


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "cnn4": lambda hidden: l2l.vision.models.CNN4Backbone(hidden_size=hidden),
    "cnn4, GroupNorm": _group_norm,
    "cnn4, pooled once": _wide,
    "resnet12": lambda _: l2l.vision.models.ResNet12Backbone(),
    "resnet12, 16,000 features": _resnet12_wide,
}


def build(shape: Shape, device: str = "cpu", channels_last: bool = True, seed: int = 0) -> Problem:
    """Random images and a network in training mode, the same for a seed."""
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    number = shape.ways * (shape.shots + shape.queries)
    images = torch.randn(number, 3, shape.pixels, shape.pixels, device=device)
    images = images.contiguous(memory_format=layout)
    backbone = NETWORKS[shape.network](shape.hidden).to(device, memory_format=layout)
    with torch.no_grad():
        width = backbone.eval()(images[:2]).shape[1]
    classes = torch.arange(shape.ways, device=device)
    labels = torch.cat([classes.repeat_interleave(n) for n in (shape.shots, shape.queries)])
    head = nn.Linear(width, shape.ways, device=device)
    return Problem(shape.title, backbone.train(), head, images, labels, shape.ways * shape.shots,
                   device)  # fmt: skip


# The floor, and ours

Step = Callable[[], None]
Adapt = Callable[[Any, Tensor, Tensor], None]
"""Adapts a clone to support features and labels."""


def supervised(problem: Problem) -> Step:
    """The floor: forward and backward over all images of the task."""
    head = problem.new_head()
    return lambda: cross_entropy(head(problem.backbone(problem.images)), problem.labels).backward()


def closure(steps: int) -> Adapt:
    """``adapt(closure, steps=K)``."""

    def adapt(learner: Any, features: Tensor, labels: Tensor) -> None:
        learner.adapt(lambda: cross_entropy(learner(features), labels), steps=steps)

    return adapt


def loss_tensors(steps: int) -> Adapt:
    """learn2learn's loop: ``adapt(loss)`` K times."""

    def adapt(learner: Any, features: Tensor, labels: Tensor) -> None:
        for _ in range(steps):
            learner.adapt(cross_entropy(learner(features), labels))

    return adapt


def cached(
    problem: Problem, head: Any, adapt: Adapt, extract: Callable[[Tensor], Tensor] | None = None
) -> Step:
    """An outer step on features that are computed once, support and query together.

    ``extract`` gives them; by default the backbone.
    """

    def step() -> None:
        features, learner = (extract or problem.backbone)(problem.images), head.clone()
        adapt(learner, features[: problem.split], problem.support[1])
        cross_entropy(learner(features[problem.split :]), problem.query[1]).backward()

    return step


def apart(problem: Problem, parent: Any, adapt: Adapt, whole: bool = False) -> Step:
    """The same with support and query through the backbone one after the other.

    Each then has batch statistics of its own, as in the methods that run the backbone again.
    ``whole``: the learner adapts the whole network, and sees the images.
    """
    extract = nn.Identity() if whole else problem.backbone
    (images, labels), (query, query_labels) = problem.support, problem.query

    def step() -> None:
        learner = parent.clone()
        adapt(learner, extract(images), labels)
        cross_entropy(learner(extract(query)), query_labels).backward()

    return step


def head_of(problem: Problem, step: str, cg_steps: int, **settings: Any) -> ImplicitCGHead:
    """The implicit head; ``step`` and ``settings`` are the command line's."""
    found = solvers(step=step, cg_steps=cg_steps, **settings)
    return ImplicitCGHead(problem.new_head(), STEP_SIZE, **found)


def implicit(problem: Problem, step: str, adapt: Adapt, cg_steps: int, **settings: Any) -> Step:
    """The implicit head's outer step; settings as in `head_of`."""
    return cached(problem, head_of(problem, step, cg_steps, **settings), adapt)


# The peers


def anil(problem: Problem, steps: int) -> Step:
    """learn2learn's MAML on the head, features computed once."""
    return cached(problem, MAML(problem.new_head(), STEP_SIZE), loss_tensors(steps))


def itd_bio(problem: Problem, steps: int) -> Step:
    """Iterative differentiation of the head from a constant start, features computed once."""
    head = UnrolledMAML(problem.new_head(), STEP_SIZE, learn_init=False)
    return cached(problem, head, closure(steps))


def higher_head(problem: Problem, steps: int) -> Step:
    """`higher` on the head, features computed once."""
    head = problem.new_head()
    optimizer = torch.optim.SGD(head.parameters(), STEP_SIZE)

    def step() -> None:
        features = problem.backbone(problem.images)
        support, query = features[: problem.split], features[problem.split :]
        with higher.innerloop_ctx(head, optimizer, copy_initial_weights=False) as (learner, inner):
            for _ in range(steps):
                inner.step(cross_entropy(learner(support), problem.support[1]))
            cross_entropy(learner(query), problem.query[1]).backward()

    return step


def anil_as_published(problem: Problem, steps: int) -> Step:
    """learn2learn's MAML on the head, the backbone run again at every inner step."""
    head = MAML(problem.new_head(), STEP_SIZE)
    (images, labels), (query, query_labels) = problem.support, problem.query

    def step() -> None:
        learner = head.clone()
        for _ in range(steps):
            learner.adapt(cross_entropy(learner(problem.backbone(images)), labels))
        cross_entropy(learner(problem.backbone(query)), query_labels).backward()

    return step


def itd_bio_as_published(problem: Problem, steps: int) -> Step:
    """Ji et al. (2020): unrolled gradient steps of a regularised head from a constant start."""
    head = problem.new_head()

    def step() -> None:
        phi = [p.detach().clone().requires_grad_() for p in head.parameters()]
        for _ in range(steps):
            gradients = grad(_inner_objective(problem, phi), phi, create_graph=True)
            phi = [p - STEP_SIZE * g for p, g in zip(phi, gradients, strict=True)]
        _loss(problem, phi, problem.query).backward()

    return step


def maml(problem: Problem, steps: int) -> Step:
    """learn2learn's MAML, whole network."""
    return apart(problem, MAML(problem.whole(), 0.01), loss_tensors(steps), whole=True)


def released(problem: Problem, steps: int, cg_steps: int, everything: bool) -> Step:
    """The released step of Yang et al., rebuilt from the paper (Algorithm 1, Subroutine 1).

    The backbone is run again at every inner step, without history; then conjugate gradient, each
    product a double backward pass of the inner gradient's graph: with ``everything`` through the
    backbone too (as a call of ``backward()`` makes it), else of the head's parameters alone.
    """
    head, theta = problem.new_head(), list(problem.backbone.parameters())

    def step() -> None:
        phi = [p.detach().clone().requires_grad_() for p in head.parameters()]
        for _ in range(steps):
            gradients = grad(_inner_objective(problem, phi), phi)
            new = [p - STEP_SIZE * g for p, g in zip(phi, gradients, strict=True)]
            phi = [p.detach().requires_grad_() for p in new]
        inner = grad(_inner_objective(problem, phi), phi, create_graph=True)
        direct = grad(_loss(problem, phi, problem.query), [*theta, *phi])
        b = [g.detach() for g in direct[len(theta) :]]
        v = _conjugate_gradient(inner, [*phi, *theta] if everything else phi, b, cg_steps)
        mixed = grad(inner, theta, v)
        for parameter, first, second in zip(theta, direct, mixed, strict=False):
            parameter.grad = first - second

    return step


def _inner_objective(problem: Problem, phi: Sequence[Tensor]) -> Tensor:
    return _loss(problem, phi, problem.support) + 0.5 * L2 * _dot(phi, phi)


def _loss(problem: Problem, phi: Sequence[Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(linear(problem.backbone(data[0]), *phi), data[1])


def _conjugate_gradient(
    gradient: Sequence[Tensor], inputs: Sequence[Tensor], b: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Subroutine 1: ``steps`` steps of CG for H v = b from v = 0, on lists of tensors."""
    v = [torch.zeros_like(x) for x in b]
    r, p = list(b), list(b)
    rr = _dot(r, r)
    for _ in range(steps):
        h = grad(gradient, inputs, p, retain_graph=True)[: len(b)]
        eta = rr / _dot(p, h)
        v = [x + eta * y for x, y in zip(v, p, strict=True)]
        r = [x - eta * y for x, y in zip(r, h, strict=True)]
        rr, before = _dot(r, r), rr
        p = [x + rr / before * y for x, y in zip(r, p, strict=True)]
    return v


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
