"""One few-shot task, and one outer step on it: the floor's, the implicit head's, its peers'.

A step leaves gradients on theta. ``as published`` means: the backbone is run again at every inner
step, with its graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import higher
import learn2learn as l2l
import torch
from learn2learn.algorithms import MAML
from learn2learn.vision.models.cnn4 import ConvBlock
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy, linear
from torch.nn.utils import parameters_to_vector

from l2l_implicit import CG, GradientDescent, ImplicitCGHead, Newton
from l2l_implicit.baselines import UnrolledMAML

STEP_SIZE = 0.1
L2 = 0.1  # of the peers that carry a regulariser of their own


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


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "cnn4": lambda hidden: l2l.vision.models.CNN4Backbone(hidden_size=hidden),
    "cnn4, GroupNorm": _group_norm,
    "cnn4, pooled once": _wide,
    "resnet12": lambda _: l2l.vision.models.ResNet12Backbone(),
}


def build(
    network: str = "cnn4", hidden: int = 64, pixels: int = 32, ways: int = 5, shots: int = 5,
    queries: int = 5, device: str = "cpu", channels_last: bool = True, seed: int = 0,
) -> Problem:  # fmt: skip
    """Random square images and one of `NETWORKS` with ``hidden`` filters, in training mode."""
    torch.manual_seed(seed)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(ways * (shots + queries), 3, pixels, pixels, device=device)
    images = images.contiguous(memory_format=layout)
    backbone = NETWORKS[network](hidden).to(device, memory_format=layout)
    with torch.no_grad():
        width = backbone.eval()(images[:2]).shape[1]
    classes = torch.arange(ways, device=device)
    labels = torch.cat([classes.repeat_interleave(n) for n in (shots, queries)])
    head = nn.Linear(width, ways, device=device)
    title = (f"{ways}-way {shots}-shot, {queries} queries a class,"
             f" {network.replace('cnn4', f'CNN4-{hidden}')}, {pixels} x {pixels}")  # fmt: skip
    return Problem(title, backbone.train(), head, images, labels, ways * shots, device)


# The floor, and ours

Step = Callable[[], None]
Images = Callable[[Tensor], Tensor]
Adapt = Callable[[Any, Callable[[], Tensor], Tensor], None]
"""Adapts a clone to the support features, from a function that is called at each loss, and labels.
"""


def supervised(problem: Problem) -> Step:
    """The floor: forward and backward over all images of the task."""
    head = problem.new_head()
    return lambda: cross_entropy(head(problem.backbone(problem.images)), problem.labels).backward()


def closure(steps: int, l2: float = 0.0) -> Adapt:
    """``adapt(closure, steps=K)``, with a regulariser in the loss or not."""

    def adapt(learner: Any, features: Callable[[], Tensor], labels: Tensor) -> None:
        def loss() -> Tensor:
            fit = cross_entropy(learner(features()), labels)
            if not l2:
                return fit
            return fit + 0.5 * l2 * parameters_to_vector(learner.module.parameters()).square().sum()

        learner.adapt(loss, steps=steps)

    return adapt


def loss_tensors(steps: int) -> Adapt:
    """learn2learn's loop: ``adapt(loss)`` K times."""

    def adapt(learner: Any, features: Callable[[], Tensor], labels: Tensor) -> None:
        for _ in range(steps):
            learner.adapt(cross_entropy(learner(features()), labels))

    return adapt


def cached(problem: Problem, head: Any, adapt: Adapt, extract: Images | None = None) -> Step:
    """An outer step on features that are computed once, support and query together.

    ``extract`` gives them; by default the backbone.
    """

    def step() -> None:
        features, learner = (extract or problem.backbone)(problem.images), head.clone()
        support, query = features[: problem.split], features[problem.split :]
        adapt(learner, lambda: support, problem.support[1])
        cross_entropy(learner(query), problem.query[1]).backward()

    return step


def apart(
    problem: Problem, parent: Any, adapt: Adapt, extract: Images | None = None, again: bool = False
) -> Step:
    """The same with support and query through the backbone one after the other.

    Each then has batch statistics of its own, as in the methods that run the backbone again.
    ``extract``: in place of the backbone, such as `IMAGES` for a learner that adapts the whole
    network; ``again``: it runs at every inner step.
    """
    seen = extract or problem.backbone
    (images, labels), (query, query_labels) = problem.support, problem.query

    def step() -> None:
        learner, once = parent.clone(), None if again else seen(images)
        adapt(learner, lambda: seen(images) if once is None else once, labels)
        cross_entropy(learner(seen(query)), query_labels).backward()

    return step


IMAGES = nn.Identity()


def head_of(problem: Problem, step: str, cg_steps: int, **settings: Any) -> ImplicitCGHead:
    """The implicit head by Newton's method or gradient steps; ``settings`` are those of `CG`."""
    linear = CG(cg_steps, **settings)
    inner = Newton(cg_steps, 0.1 * linear.tol) if step == "newton" else GradientDescent()
    return ImplicitCGHead(problem.new_head(), STEP_SIZE, inner=inner, linear=linear)


def implicit(problem: Problem, step: str, adapt: Adapt, cg_steps: int, **settings: Any) -> Step:
    """The implicit head's outer step; settings as in `head_of`."""
    return cached(problem, head_of(problem, step, cg_steps, **settings), adapt)


# The peers


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


def _anil(problem: Problem) -> Any:
    return MAML(problem.new_head(), STEP_SIZE)


def _itd_bio(problem: Problem) -> Any:
    return UnrolledMAML(problem.new_head(), STEP_SIZE, learn_init=False)


PEERS: dict[str, Callable[[Problem, int], Step]] = {
    "ANIL (learn2learn), features cached": lambda p, k: cached(p, _anil(p), loss_tensors(k)),
    "ITD-BiO, features cached": lambda p, k: cached(p, _itd_bio(p), closure(k)),
    "higher, head, features cached": higher_head,
    "ANIL (learn2learn), as published":
        lambda p, k: apart(p, _anil(p), loss_tensors(k), again=True),
    # Ji et al. (2020): of a regularised head
    "ITD-BiO, as published": lambda p, k: apart(p, _itd_bio(p), closure(k, L2), again=True),
    "MAML (learn2learn), whole network":
        lambda p, k: apart(p, MAML(p.whole(), 0.01), loss_tensors(k), IMAGES),
}  # fmt: skip
"""An outer step of K inner ones, by method."""


def released(problem: Problem, steps: int, cg_steps: int, everything: bool) -> Step:
    """The released step of Yang et al., rebuilt from the paper (Algorithm 1, Subroutine 1).

    The backbone is run again at every inner step, without history; then conjugate gradient, each
    product a double backward pass of the inner gradient's graph: with ``everything`` through the
    backbone too (as a call of ``backward()`` makes it), else of the head's parameters alone.
    """
    head, theta = problem.head, list(problem.backbone.parameters())
    start = torch.cat([head.weight, head.bias[:, None]], 1).detach()

    def loss(phi: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(linear(problem.backbone(data[0]), phi[:, :-1], phi[:, -1]), data[1])

    def inner(phi: Tensor) -> Tensor:
        return loss(phi, problem.support) + 0.5 * L2 * phi.square().sum()

    def step() -> None:
        phi = start.clone().requires_grad_()
        for _ in range(steps):
            phi = (phi - STEP_SIZE * grad(inner(phi), phi)[0]).detach().requires_grad_()
        (gradient,) = grad(inner(phi), phi, create_graph=True)
        *direct, b = grad(loss(phi, problem.query), [*theta, phi])
        inputs = [phi, *theta] if everything else [phi]
        v, r, p = torch.zeros_like(b), b, b
        for _ in range(cg_steps):  # Subroutine 1: H v = b from v = 0
            h = grad(gradient, inputs, p, retain_graph=True)[0]
            rr = r.square().sum()
            eta = rr / (p * h).sum()
            v, r = v + eta * p, r - eta * h
            p = r + r.square().sum() / rr * p
        mixed = grad(gradient, theta, v)
        for parameter, first, second in zip(theta, direct, mixed, strict=True):
            parameter.grad = first - second

    return step
