"""A closed form needs no closure between its ends, and takes the very steps that one would take."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_implicit import ImplicitCGHead, ImplicitMAML
from l2l_implicit.inner_problem.linear_head import LinearHeadLinearization
from l2l_implicit.inner_problem.span import HeadInSpan, SpanLinearization

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning"),
]
WIDTH, CLASSES, SAMPLES = 30, 3, 9
LABELS = torch.arange(SAMPLES) % CLASSES
SOLVED = {"cg_tol": 1e-13, "cg_steps": 200}
SETTINGS = {
    "gradient": {"step": "gradient", "lr": 0.3, **SOLVED},
    "auto": {"step": "gradient", "lr": "auto", **SOLVED},
    "newton": {"step": "newton", "lr": 0.3, **SOLVED},
    "lbfgs": {"step": "lbfgs", "lr": 0.3, **SOLVED},
}
# Newton's direction is exact in the closed form and CG's, with its own tolerance, on the general
# path; torch's L-BFGS scales its first step by a 1-norm, which a rotation changes: these two meet
# at the minimum only.
CASES = [*product(("gradient", "auto"), (1, 2, 30)), ("lbfgs", 60), ("newton", 30)]
Loss = Callable[[Tensor, Tensor], Tensor]


def squared(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(outputs, F.one_hot(labels, CLASSES).to(outputs.dtype))


LOSSES: dict[str, Loss] = {"cross-entropy": F.cross_entropy, "squared error": squared}


def learn(
    loss: Loss, width: int, steps: int, bias: bool, anchor: str, settings: dict[str, object]
) -> tuple[Tensor, Tensor, Tensor]:
    """Phi, the features' gradient and the initial weight's."""
    torch.manual_seed(1)
    features = torch.randn(2 * SAMPLES, width).relu_().requires_grad_()
    cls = ImplicitMAML if anchor == "init" else ImplicitCGHead
    head = cls(nn.Linear(width, CLASSES, bias=bias), l2=0.2, **settings)  # type: ignore[arg-type]
    learner, h = head.clone(), features * 1.0
    support, query = h[:SAMPLES], h[SAMPLES:]  # one tensor for all calls, else no closed form
    learner.adapt(lambda: loss(learner(support), LABELS), steps=steps)
    F.cross_entropy(learner(query), LABELS).backward()
    phi = torch.cat([p.detach().reshape(-1) for p in learner.parameters()])
    assert features.grad is not None and head.module.weight.grad is not None
    return phi, features.grad, head.module.weight.grad


@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [WIDTH, 5], ids=["few samples", "many samples"])
@pytest.mark.parametrize(("name", "steps"), CASES)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_steps_are_those_of_the_general_path(
    loss: str, name: str, steps: int, width: int, bias: bool, anchor: str
) -> None:
    def unrecognized(outputs: Tensor, labels: Tensor) -> Tensor:
        return LOSSES[loss](outputs, labels) * 1.0  # the graph does not end in a known loss

    found = learn(LOSSES[loss], width, steps, bias, anchor, SETTINGS[name])
    expected = learn(unrecognized, width, steps, bias, anchor, SETTINGS[name])
    # 'auto' estimates the curvature to 1 %, from a start that is another one in other coordinates.
    tol = 0.01 if name == "auto" else 1e-8
    for value, other in zip(found, expected, strict=True):
        assert float((value - other).norm()) <= tol * float(other.norm()) + 1e-12


def linearized(width: int, anchor: str) -> LinearHeadLinearization:
    torch.manual_seed(2)
    head = ImplicitMAML(nn.Linear(width, CLASSES), 0.3, l2=0.2, anchor=anchor)
    learner = head.clone()
    h = torch.randn(SAMPLES, width, requires_grad=True)
    learner.adapt(F.cross_entropy(learner(h), LABELS))
    found = learner._task.linearization()
    assert isinstance(found, LinearHeadLinearization)
    return found


@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_the_coordinates_keep_objective_gradient_and_products(anchor: str) -> None:
    at = linearized(WIDTH, anchor)
    head = HeadInSpan(at)
    small = SpanLinearization(head, at.output_loss, head.start)
    assert torch.allclose(head.phi(head.start), at.point, atol=1e-12)
    assert small.objective == pytest.approx(at.objective, rel=1e-12)
    assert small.gradient_norm == pytest.approx(at.gradient_norm, rel=1e-12)
    offset = head.phi(torch.zeros_like(head.start))
    lifted = head.phi(small.gradient) - offset
    assert torch.allclose(lifted, at.gradient, atol=1e-12)
    product = head.phi(small.hvp(small.gradient)) - offset
    assert torch.allclose(product, at.hvp(at.gradient), atol=1e-12)
    direction = small.newton_direction()
    assert direction is not None
    assert torch.allclose(small.hvp(direction), -small.gradient, atol=1e-10)


def test_a_closure_that_returns_the_same_loss_is_called_twice() -> None:
    calls, h = 0, torch.randn(SAMPLES, WIDTH)
    learner = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1).clone()

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(learner(h), LABELS)

    learner.adapt(closure, steps=20)
    assert calls == 2


@pytest.mark.parametrize("changes", ["features", "labels"])
@pytest.mark.parametrize("name", ["gradient", "auto"])
def test_a_closure_that_draws_anew_is_asked_at_every_step(changes: str, name: str) -> None:
    """As a minibatch or dropout does: the steps are those of the losses in their order."""
    torch.manual_seed(3)
    batches = torch.randn(8, SAMPLES, WIDTH)
    labels = torch.randint(CLASSES, (8, SAMPLES))
    if changes == "features":
        labels = labels[:1].expand(8, -1)
    else:
        batches = batches[:1].expand(8, -1, -1)
    module = nn.Linear(WIDTH, CLASSES)
    results = []
    for factor in (None, 1.0):  # a product hides the closed form
        learner = ImplicitCGHead(module, l2=0.2, **SETTINGS[name]).clone()  # type: ignore[arg-type]
        drawn = iter([0, 7, 1, 2, 3, 4] if factor is None else [0, 1, 2, 3, 4])

        def closure(learner=learner, drawn=drawn, factor=factor) -> Tensor:  # type: ignore[no-untyped-def]
            i = next(drawn)
            value = F.cross_entropy(learner(batches[i]), labels[i])
            return value if factor is None else value * factor

        learner.adapt(closure, steps=4)
        results.append(torch.cat([p.detach().reshape(-1) for p in learner.parameters()]))
        assert learner._task.steps == 4
    assert torch.allclose(results[0], results[1], atol=1e-12)


def test_a_second_adapt_goes_on_from_the_first() -> None:
    torch.manual_seed(4)
    module, h = nn.Linear(WIDTH, CLASSES), torch.randn(SAMPLES, WIDTH)
    ends = []
    for pieces in ((6,), (2, 4), (1, 1, 4)):
        learner = ImplicitCGHead(module, 0.3, step="gradient", l2=0.2).clone()
        for steps in pieces:
            learner.adapt(
                lambda learner=learner: F.cross_entropy(learner(h), LABELS),  # type: ignore[misc]
                steps=steps,
            )
        ends.append(torch.cat([p.detach().reshape(-1) for p in learner.parameters()]))
        assert learner._task.steps == 6
    assert torch.allclose(ends[0], ends[1], atol=1e-12)
    assert torch.allclose(ends[0], ends[2], atol=1e-12)
