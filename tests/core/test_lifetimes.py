"""What the learner leaves behind: nothing."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from small_task import SIX_LABELS as Y
from small_task import fit
from small_task import six_inputs as x
from small_task import small_nets as nets

from l2l_implicit import GradientDescent, ImplicitCGHead, Newton
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.inner_solvers.protocol import InnerSolver

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Reference cycles stay visible."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def linearizations(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet:
    """Every linearization that is alive."""
    alive: weakref.WeakSet = weakref.WeakSet()
    initialize = Linearization.__init__

    def spy(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        alive.add(self)

    monkeypatch.setattr(Linearization, "__init__", spy)
    return alive


CASES = pytest.mark.parametrize("head, how, inner", [
    (head, how, inner) for head in ("linear", "deep") for how in ("loss", "closure")
    for inner in (Newton(), GradientDescent())
])  # fmt: skip


@CASES
def test_one_linearization_lives_and_dies_with_backward(
    head: str, how: str, inner: InnerSolver, linearizations: weakref.WeakSet
) -> None:
    parent = ImplicitCGHead(nets()[head], 0.1, inner=inner, l2=0.5)
    learner, inputs = parent.clone(), x()
    fit(learner, inputs, how)
    assert len(linearizations) == 1
    loss = F.cross_entropy(learner(inputs), Y)
    loss.backward(retain_graph=True)
    assert len(linearizations) == 1
    loss.backward()
    assert len(linearizations) == 0 and loss is not None and learner is not None


@CASES
def test_dropped_without_backward(
    head: str, how: str, inner: InnerSolver, linearizations: weakref.WeakSet
) -> None:
    parent = ImplicitCGHead(nets()[head], 0.1, inner=inner)
    learner, inputs = parent.clone(), x()
    fit(learner, inputs, how)
    loss, gone = F.cross_entropy(learner(inputs), Y), weakref.ref(learner)
    del learner
    assert gone() is None, "the graph holds its learner"
    assert len(linearizations) == 1, "the loss does not hold its linearization"
    del loss
    assert len(linearizations) == 0


@CASES
def test_features_die_with_their_owner(head: str, how: str, inner: InnerSolver) -> None:
    parent = ImplicitCGHead(nets()[head], 0.1, inner=inner)
    theta, learner = torch.randn(4, 4, requires_grad=True), parent.clone()
    h = torch.tanh(x() @ theta)
    gone = weakref.ref(h)
    fit(learner, h, how)
    loss = F.cross_entropy(learner(h), Y)
    del h
    assert gone() is not None
    loss.backward()
    assert gone() is None, "features live on after backward, though only the loss's value is kept"
    assert theta.grad is not None and learner is not None


@CASES
def test_evaluation_without_grad_keeps_nothing(
    head: str, how: str, inner: InnerSolver, linearizations: weakref.WeakSet
) -> None:
    parent = ImplicitCGHead(nets()[head], 0.1, inner=inner).eval()
    inputs = x()
    with torch.no_grad():
        learner = parent.clone()
        learner.adapt(lambda: F.cross_entropy(learner(inputs), Y), steps=5)
        out = learner(inputs)
    assert not out.requires_grad and len(linearizations) == 0
    assert all(p.is_leaf for p in learner.module.parameters())
    assert all(p.grad is None for p in parent.parameters())
    reference = parent.clone()
    reference.adapt(lambda: F.cross_entropy(reference(inputs), Y), steps=5)
    assert torch.equal(reference(inputs), out)
