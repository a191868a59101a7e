"""What a learner makes of a linear head's loss: the minimum at once, or steps in closed form."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, relative_error
from small_task import HOWS, SIX_LABELS, adapt, six_inputs, small_nets
from test_recognition import CLASSES, EXACT, FUNCTIONS, WIDTH, M, Y
from torch import Tensor, nn

from l2l_implicit import CG, LBFGS, GradientDescent, ImplicitCGHead
from l2l_implicit.inner_problem.losses import OutputLoss

pytestmark = pytest.mark.usefixtures("float64")

DESCENT = {
    "gradient": {"inner": GradientDescent(), "linear": CG(steps=200, tol=1e-13)},
    "adaptive": {"inner": GradientDescent(adaptive=True), "linear": CG(steps=200, tol=1e-13)},
    "newton": EXACT,
    "lbfgs": {"inner": LBFGS(tol=1e-14), "linear": CG(steps=200, tol=1e-13)},
}
# Newton and L-BFGS take other steps in closed form: these two meet at the minimum only.
RUNS = [*product(("gradient", "adaptive"), (1, 3)), ("lbfgs", 80), ("newton", 30)]


def learn(
    loss: Callable[..., Tensor], width: int, steps: int, bias: bool, anchor: str, how: str,
    settings: dict[str, Any],
) -> list[Tensor]:  # fmt: skip
    """Phi, the gradients of features and l2, and of the initial weight and bias."""
    torch.manual_seed(1)
    features = torch.randn(2 * M, width).relu_().requires_grad_()
    l2 = torch.tensor(0.2, requires_grad=True)
    head = ImplicitCGHead(
        nn.Linear(width, CLASSES, bias=bias), 0.3, l2=l2, anchor=anchor, **settings
    )
    learner, h = head.clone(), features * 1.0
    support, query = h[:M], h[M:]
    adapt(learner, lambda: loss(learner(support), Y), how, steps)
    F.cross_entropy(learner(query), Y).backward()
    initial = [p.grad for p in head.module.parameters()]
    return [flat(learner.parameters()), features.grad, l2.grad, *initial]  # type: ignore[list-item]


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [30, 5], ids=["few samples", "many samples"])
@pytest.mark.parametrize(("name", "steps"), RUNS)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_steps_are_those_of_the_general_path(
    kind: type[OutputLoss], name: str, steps: int, width: int, bias: bool, anchor: str
) -> None:
    def unrecognized(outputs: Tensor, labels: Tensor) -> Tensor:
        return FUNCTIONS[kind](outputs, labels) * 1.0  # the graph does not end in a known loss

    arguments = width, steps, bias, anchor, "closure", DESCENT[name]
    found, expected = learn(FUNCTIONS[kind], *arguments), learn(unrecognized, *arguments)
    for value, other in zip(found, expected, strict=True):
        assert float((value - other).norm()) <= 1e-8 * float(other.norm()) + 1e-12


def solved() -> tuple[ImplicitCGHead, Tensor]:
    """A learner whose head Newton has solved, and its features."""
    h = torch.randn(M, WIDTH, requires_grad=True) * 1.0
    learner = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, anchor="init").clone()
    learner.adapt(F.cross_entropy(learner(h), Y))
    return learner, h


def test_further_calls_with_the_same_data_change_nothing() -> None:
    learner, h = solved()
    before, at = [*learner.module.parameters()], learner._task.linearization()
    for _ in range(4):
        learner.adapt(F.cross_entropy(learner(h), Y))
    assert all(a is b for a, b in zip(before, learner.module.parameters(), strict=True))
    assert learner._task.linearization() is at


def moved_weights(learner: ImplicitCGHead, h: Tensor) -> tuple[Tensor, Tensor]:
    learner.module.weight = nn.Parameter(2.0 * learner.module.weight.detach())
    return h, Y


def moved_anchor(learner: ImplicitCGHead, h: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        learner._task.initial[0].add_(1.0)
    return h, Y


CHANGES: dict[str, Callable[[ImplicitCGHead, Tensor], tuple[Tensor, Tensor]]] = {
    "weights": moved_weights,
    "anchor's values": moved_anchor,
    "l2": lambda learner, h: (setattr(learner, "l2", 0.7) or h, Y),
    "anchor": lambda learner, h: (setattr(learner, "anchor", "zero") or h, Y),
    "targets": lambda learner, h: (h, Y.roll(1)),
    "features": lambda learner, h: (h + 1.0, Y),
    "history": lambda learner, h: (h.detach().requires_grad_() * 1.0, Y),
    "no history": lambda learner, h: (h.detach(), Y),
    "fewer samples": lambda learner, h: (h[:-1], Y[:-1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_solved_anew(change: str) -> None:
    learner, h = solved()
    h, y = CHANGES[change](learner, h)
    learner.adapt(F.cross_entropy(learner(h), y))
    at = learner._task.linearization()
    assert at is not None and float(at.gradient_norm) < 1e-9
    assert torch.equal(at.point[0], flat(learner.module.parameters()))
    fresh = [p.detach().clone().requires_grad_() for p in learner.module.parameters()]
    initial = learner._task.initial if learner.anchor == "init" else [0.0, 0.0]
    loss = F.cross_entropy(F.linear(h.detach(), *fresh), y)
    squares = sum((p - a).square().sum() for p, a in zip(fresh, initial, strict=True))
    slopes = torch.autograd.grad(loss + 0.5 * float(learner.l2) * squares, fresh)
    assert all(float(slope.norm()) < 1e-9 for slope in slopes)
    assert len(at.sources()) == (change != "no history") + 2 * (learner.anchor == "init")
    if h.requires_grad:
        assert at.sources()[0] is h


@pytest.mark.parametrize("head", ["linear", "deep"])
@HOWS
def test_features_overwritten_before_adapt_are_refused(how: str, head: str) -> None:
    """Torch notices that a saved tensor was overwritten: no silent wrong number."""
    h = six_inputs().requires_grad_() * 1.0
    learner = ImplicitCGHead(small_nets()[head], 0.1).clone()

    def support() -> Tensor:
        loss = F.cross_entropy(learner(h), SIX_LABELS)
        with torch.no_grad():
            h.add_(1.0)
        return loss

    with pytest.raises(RuntimeError, match="changed in place since; clone it first"):
        adapt(learner, support, how, 1)


@HOWS
@pytest.mark.parametrize("data, head", [
    ("features", "linear"), ("features", "deep"), ("features, unseen", "linear"),
    ("targets", "linear"),
])  # fmt: skip
def test_data_overwritten_after_adapt_are_those_of_adapt(data: str, how: str, head: str) -> None:
    """The learner holds copies: what is written to the originals later is of no matter."""
    theta, x, module = torch.randn(4, 4).requires_grad_(), six_inputs(), small_nets()[head]
    found = []
    for overwritten in (False, True):
        y, h = SIX_LABELS.clone(), x @ theta
        learner = ImplicitCGHead(module, 0.1, l2=0.5).clone()
        adapt(learner, lambda n=learner, h=h, y=y: F.cross_entropy(n(h), y), how, 8)
        if overwritten:
            {"features": h.mul_, "features, unseen": h.data.mul_, "targets": y.mul_}[data](0)
        loss = F.cross_entropy(learner(x), SIX_LABELS.roll(1))
        found.append(torch.autograd.grad(loss, theta))
    assert relative_error(*found) < 1e-12


@HOWS
def test_data_changed_without_a_trace_are_refused_on_the_general_path(how: str) -> None:
    """There the graph is evaluated again in the backward pass, with what it finds."""
    x = torch.randn(M, WIDTH)
    learner = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, l2=torch.tensor(0.1).requires_grad_())
    learner = learner.clone()

    def support() -> Tensor:
        return (learner(x).square() * x[:, :CLASSES].exp()).mean()

    adapt(learner, support, how, 1)
    loss = learner(torch.ones(2, WIDTH)).square().sum()
    x.data.mul_(2.0)
    with pytest.raises(RuntimeError, match="another gradient when its graph was evaluated again"):
        loss.backward()


# Closures


@pytest.mark.parametrize("name", ["gradient", "newton"])
def test_a_closure_that_returns_the_same_loss_is_called_twice(name: str) -> None:
    calls, h = 0, torch.randn(M, WIDTH)
    learner = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, **DESCENT[name]).clone()

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(learner(h), Y)

    learner.adapt(closure, steps=20)
    assert calls == 2


def test_a_closure_that_makes_its_features_anew_is_solved_all_the_same() -> None:
    """The features are equal, their history is another one at each call: the last one counts."""
    backbone, images = nn.Linear(5, WIDTH), torch.randn(M, 5)
    found = []
    for anew in (False, True):
        backbone.zero_grad()
        learner = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, l2=1e-3).clone()
        torch.nn.init.ones_(learner._task.initial[0])
        h = torch.tanh(backbone(images))
        learner.adapt(
            lambda n=learner, h=h, anew=anew: F.cross_entropy(
                n(torch.tanh(backbone(images)) if anew else h), Y
            ),
            steps=1,
        )
        learner(h).square().sum().backward()
        assert learner.diagnostics.unsolved == 0
        found.append(backbone.weight.grad.clone())
    assert relative_error(found[1:], found[:1]) < 1e-9


def drawing(
    learner: ImplicitCGHead, order: list[int], changes: str, factor: float | None = None
) -> Callable[[], Tensor]:
    """A closure with another batch at each call, as a minibatch or dropout has it."""
    generator, drawn = torch.Generator().manual_seed(3), iter(order)
    batches = torch.randn(8, M, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (8, M), generator=generator)

    def closure() -> Tensor:
        i = next(drawn)
        x, y = (i, 0) if changes == "features" else (0, i)
        value = F.cross_entropy(learner(batches[x]), labels[y])
        return value if factor is None else value * factor

    return closure


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("changes", ["features", "labels"])
@pytest.mark.parametrize("name", ["gradient", "adaptive"])
def test_a_closure_that_draws_anew_is_asked_at_every_step(changes: str, name: str) -> None:
    """The steps are those of the losses in their order."""
    module, results = nn.Linear(WIDTH, CLASSES), []
    # A product hides the closed form, for which there are two calls before the steps.
    # After them there is one, for the gradient at their end.
    for order, factor in (([6, 7, 0, 1, 2, 3, 4], None), ([0, 1, 2, 3, 4], 1.0)):
        learner = ImplicitCGHead(module, 0.3, l2=0.2, **DESCENT[name]).clone()
        with torch.no_grad():  # no comparison of derivatives, which asks for more
            learner.adapt(drawing(learner, order, changes, factor), steps=4)
        results.append(flat(learner.parameters()))
        assert learner._task.steps == 4
    assert torch.allclose(results[0], results[1], atol=1e-12)


@pytest.mark.parametrize("changes", ["features", "labels"])
def test_newton_solves_what_a_closure_computed_last(changes: str) -> None:
    module, weights = nn.Linear(WIDTH, CLASSES), []
    for order in ([0, 1], [1, 1]):
        learner = ImplicitCGHead(module, 0.1).clone()
        learner.adapt(drawing(learner, order, changes), steps=1)
        weights.append(learner.module.weight.detach())
    assert relative_error(weights[:1], weights[1:]) < 1e-12


def test_a_second_adapt_goes_on_from_the_first() -> None:
    module, h, ends = nn.Linear(WIDTH, CLASSES), torch.randn(M, WIDTH), []
    for pieces in ((6,), (2, 4), (1, 1, 4)):
        learner = ImplicitCGHead(module, 0.3, l2=0.2, inner=GradientDescent()).clone()
        for steps in pieces:
            learner.adapt(lambda n=learner: F.cross_entropy(n(h), Y), steps=steps)
        ends.append(flat(learner.parameters()))
        assert learner._task.steps == 6
    assert all(torch.allclose(ends[0], end, atol=1e-12) for end in ends[1:])
