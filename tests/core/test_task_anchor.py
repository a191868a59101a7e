"""An anchor of the task's own: its hypergradient reaches what made the anchor."""

from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from several_tasks import Batch, assert_alike
from small_task import HOWS, adapt, silent
from torch import Tensor, nn

from l2l_implicit import (
    LBFGS,
    Direct,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    Newton,
    Perturbed,
    UnsolvedWarning,
)

pytestmark = pytest.mark.usefixtures("float64")
Y, YQ, WAYS, WIDTH, L2 = torch.arange(9) % 3, torch.arange(6) % 3, 3, 7, 0.3
Theta = tuple[Tensor, Tensor]  # the backbone, the scale of the prototypes


class Own(ImplicitCGHead):
    """Autograd carries the regulariser."""

    def regularizer(self, parameters: Any, anchor: Any) -> Tensor:
        pairs = zip(parameters, anchor, strict=True)
        return 0.5 * self.l2 * sum((p - a).square().sum() for p, a in pairs)


# Prototypes: a head on features of theta, whose anchor is theta's too.


def prototypes(h: Tensor, scale: Tensor) -> list[Tensor]:
    means = torch.stack([h[Y == c].mean(0) for c in range(WAYS)])
    return [scale * means, -0.5 * scale * means.square().sum(1)]


def inner(phi: Tensor, backbone: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    h = torch.tanh(x @ backbone)
    anchor = torch.cat([a.reshape(-1) for a in prototypes(h, scale)])
    loss = F.cross_entropy(oracles.linear(phi, h, WAYS), Y)
    return loss + 0.5 * L2 * (phi - anchor).square().sum()


def expected(theta: Theta, x: Tensor, xq: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The solution and both hypergradients, by dense matrices."""
    def g(phi: Tensor, *theta: Tensor) -> Tensor:
        return inner(phi, *theta, x)

    def f(phi: Tensor, backbone: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(oracles.linear(phi, torch.tanh(xq @ backbone), WAYS), YQ)

    phi = oracles.polish(g, torch.zeros(WAYS * (WIDTH + 1)), theta)
    return phi, oracles.implicit(g, f, theta, phi)


SETTINGS: dict[str, tuple[type[ImplicitCGHead], dict[str, Any], int]] = {
    "newton": (ImplicitCGHead, {}, 1),
    "gradient": (ImplicitCGHead, {"inner": GradientDescent(), "linear": Direct()}, 400),
    "own": (Own, {"inner": Newton(tol=1e-12), "linear": Direct()}, 12),
    "init": (ImplicitCGHead, {"anchor": "init"}, 1),
}


@HOWS
@pytest.mark.parametrize("name", SETTINGS)
def test_prototypes_by_dense_matrices(name: str, how: str) -> None:
    cls, settings, steps = SETTINGS[name]
    theta = torch.randn(5, WIDTH).requires_grad_(), torch.tensor(0.7).requires_grad_()
    x, xq = torch.randn(9, 5), torch.randn(6, 5)
    phi, gradients = expected(theta, x, xq)
    head = cls(nn.Linear(WIDTH, WAYS), lr=1.0, l2=L2, **settings)
    h = torch.tanh(x @ theta[0])
    learner = head.clone(anchor=prototypes(h, theta[1]))
    before = oracles.flat(prototypes(h, theta[1]))
    assert torch.equal(oracles.flat(learner.parameters()), before)  # where it starts
    adapt(learner, lambda: F.cross_entropy(learner(h), Y), how, steps)
    F.cross_entropy(learner(torch.tanh(xq @ theta[0])), YQ).backward()
    assert oracles.relative_error([oracles.flat(learner.parameters())], [phi]) < 1e-8
    assert oracles.relative_error([t.grad for t in theta], gradients) < 1e-6  # type: ignore[misc]
    for p in head.parameters():  # a loop that scales p.grad goes on working
        assert p.grad is not None and not p.grad.any()


@pytest.mark.parametrize("inner", [Newton(), GradientDescent()], ids=repr)
def test_together_as_one_at_a_time(inner: Any) -> None:
    """T anchors of T tasks, of features of theta; three are enough to tell a sum from a mean."""
    batch = Batch()
    batch.anchor = lambda h: [0.7 * h[:3], -0.5 * h[:3].square().sum(1)]
    batch.query_weights = torch.tensor([1.0, 2.0, -1.0])
    assert_alike(batch, 3, inner=inner, max_error=1e9)


# A hypernetwork: the anchor of a whole network.


def test_a_hypernetwork_by_dense_matrices() -> None:
    """In closed form, by a closure that is called again, and by autograd's own regulariser."""
    z, x, xq = torch.randn(4), torch.randn(9, 2), torch.randn(6, 2)

    def g(phi: Tensor, made_by: Tensor) -> Tensor:
        loss = F.cross_entropy(oracles.network(phi, x, 4, 3, torch.tanh), Y)
        return loss + 0.5 * (phi - 0.3 * z @ made_by).square().sum()

    def f(phi: Tensor, _: Tensor) -> Tensor:
        return F.cross_entropy(oracles.network(phi, xq, 4, 3, torch.tanh), YQ)

    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    n = sum(p.numel() for p in net.parameters())
    made_by = torch.randn(4, n)
    phi = oracles.polish(g, 0.3 * z @ made_by, [made_by])
    expected = oracles.implicit(g, f, [made_by], phi)
    kinds: list[tuple[type[ImplicitCGHead], Any, float]] = [
        (ImplicitMAML, Direct(), 1e-6), (Own, Direct(), 1e-6),
        (ImplicitMAML, Perturbed(steps=300, tol=1e-7), 1e-5),
    ]  # fmt: skip
    for cls, linear, tol in kinds:
        leaf = made_by.clone().requires_grad_()
        maml = cls(net, 0.1, l2=1.0, inner=LBFGS(tol=1e-11), linear=linear)
        sizes = [p.numel() for p in net.parameters()]
        pieces = (0.3 * z @ leaf).split(sizes)
        anchor = [a.view_as(p) for a, p in zip(pieces, net.parameters(), strict=True)]
        learner = maml.clone(anchor=anchor)
        learner.adapt(lambda n=learner: F.cross_entropy(n(x), Y), steps=300)
        F.cross_entropy(learner(xq), YQ).backward()
        assert oracles.relative_error([leaf.grad], expected) < tol  # type: ignore[list-item]


def test_fomaml_starts_from_the_anchor_and_reaches_it() -> None:
    leaf, h = torch.randn(WAYS, WIDTH).requires_grad_(), torch.randn(9, WIDTH)
    head = ImplicitCGHead(nn.Linear(WIDTH, WAYS, bias=False), 0.1, first_order=True)
    learner = head.clone(anchor=leaf)
    learner.adapt(F.cross_entropy(learner(h), Y))
    F.cross_entropy(learner(h), Y.roll(1)).backward()
    slope = torch.autograd.grad(F.cross_entropy(h @ leaf.T, Y), leaf)[0]
    phi = (leaf - 0.1 * slope).detach().requires_grad_()
    F.cross_entropy(h @ phi.T, Y.roll(1)).backward()
    assert oracles.relative_error([leaf.grad], [phi.grad]) < 1e-12  # type: ignore[list-item]


def test_without_gradients_from_memory_in_half_precision_and_frozen_parts() -> None:
    anchor, h = [torch.randn(WAYS, WIDTH), torch.randn(WAYS)], torch.randn(9, WIDTH)
    head = ImplicitCGHead(nn.Linear(WIDTH, WAYS), 0.1, warm_start=True)

    def solution(n: ImplicitCGHead) -> Tensor:
        n.adapt(lambda: F.cross_entropy(n(h), Y), steps=1)
        return oracles.flat(n.parameters())

    with torch.no_grad():
        alone = solution(head.clone(anchor=anchor))
    learner = head.clone(task="a", anchor=anchor)
    assert torch.equal(solution(learner), alone)
    learner(h).square().sum().backward()
    again = head.clone(task="a", anchor=[torch.zeros_like(a) for a in anchor])
    assert torch.equal(oracles.flat(again.parameters()), alone)  # remembered
    assert not torch.allclose(solution(again), alone)  # another problem
    half = solution(head.clone(anchor=[a.bfloat16() for a in anchor]))
    wide = solution(head.clone(anchor=[a.bfloat16().double() for a in anchor]))
    assert torch.equal(half, wide)

    head.module.bias.requires_grad_(False)
    partly = head.clone(allow_nograd=True, anchor=anchor[0])
    assert torch.equal(partly.module.weight, anchor[0])
    assert torch.equal(partly.module.bias, head.module.bias)
    solution(partly)


def test_the_next_task_has_the_modules_own_again() -> None:
    head, h = ImplicitCGHead(nn.Linear(WIDTH, WAYS), 0.1), torch.randn(9, WIDTH)
    solutions = []
    with silent(UnsolvedWarning):
        for anchor in (None, [torch.randn(WAYS, WIDTH), torch.randn(WAYS)], None):
            learner = head.clone(anchor=anchor)
            learner.adapt(lambda n=learner: F.cross_entropy(n(h), Y), steps=1)  # type: ignore[misc]
            solutions.append(oracles.flat(learner.parameters()))
    assert torch.equal(solutions[0], solutions[2]) and not torch.equal(*solutions[:2])


def test_what_is_no_anchor_is_one_line() -> None:
    head, weight, bias = ImplicitCGHead(nn.Linear(4, 3), 0.1), torch.zeros(3, 4), torch.zeros(3)
    h, y = torch.randn(2, 6, 4), torch.arange(6).expand(2, 6) % 3
    wrong: list[Any] = [weight, [weight], [bias, weight], [weight, 0.0], "zero", 3,
                        [weight.long(), bias.long()]]  # fmt: skip
    for anchor in wrong:
        with pytest.raises(ValueError, match=r"^anchor: expected .*\(3, 4\)[^\n]*$"):
            head.clone(anchor=anchor)
    with pytest.raises(ValueError, match=r"^anchor: expected .*\(2, 3, 4\)[^\n]*$"):
        head.adapt_together(h, y, anchor=[weight, bias])
    with pytest.raises(TypeError, match=r"^anchor: expected 'zero'[^\n]*clone\(anchor=...\)$"):
        ImplicitCGHead(nn.Linear(4, 3), 0.1, anchor=[weight, bias])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^anchor: expected .* on cpu, got"):
        head.clone(anchor=[weight.to("meta"), bias.to("meta")])
