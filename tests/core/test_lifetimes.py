"""What the learner leaves behind: nothing."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from small_task import HOWS, Y, fit, nets, x

from l2l_implicit import GaussNewton, GradientDescent, ImplicitCGHead, Newton
from l2l_implicit.inner_problem.linear_heads import LinearHeads
from l2l_implicit.inner_problem.linearization import AutogradLinearization

pytestmark = pytest.mark.usefixtures("float64", "no_collector")


@pytest.fixture
def linearizations(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet:
    """Every linearization that is alive."""
    alive: weakref.WeakSet = weakref.WeakSet()
    for kind in (AutogradLinearization, LinearHeads):

        def spy(self, *args, initialize=kind.__init__, **kwargs):
            initialize(self, *args, **kwargs)
            alive.add(self)

        monkeypatch.setattr(kind, "__init__", spy)
    return alive


SOLVERS = [{"inner": Newton()}, {"inner": GradientDescent()}, {"curvature": GaussNewton()}]


@pytest.mark.parametrize("head", ["linear", "deep"])
@pytest.mark.parametrize("solver", SOLVERS)
@HOWS
def test_one_linearization_lives_and_dies_with_the_loss(
    head: str, how: str, solver: dict, linearizations: weakref.WeakSet
) -> None:
    """At the backward pass, or with the loss that is dropped without one; features too."""
    parent = ImplicitCGHead(nets()[head], 0.1, l2=0.5, **solver)
    for with_backward in (True, False):
        theta, learner = torch.randn(4, 4, requires_grad=True), parent.clone()
        h = torch.tanh(x() @ theta)
        fit(learner, h, how)
        loss, features = F.cross_entropy(learner(h), Y), weakref.ref(h)
        del h
        assert len(linearizations) == 1 and features() is not None
        if with_backward:
            loss.backward(retain_graph=True)
            assert len(linearizations) == 1
            loss.backward()
            assert features() is None and len(linearizations) == 0
        gone = weakref.ref(learner)
        del learner
        assert gone() is None, "the graph holds its learner"
        assert len(linearizations) == (not with_backward), "the loss does not hold it"
        del loss
        assert len(linearizations) == 0 and features() is None and theta is not None


@pytest.mark.parametrize("head", ["linear", "deep"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluation_without_grad_keeps_nothing(
    head: str, solver: dict, linearizations: weakref.WeakSet
) -> None:
    """And ends where an adaptation with gradients does (contract.py), to the last digit."""
    parent, inputs, found = ImplicitCGHead(nets()[head], 0.1, **solver).eval(), x(), []
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            learner = parent.clone()
            fit(learner, inputs, "closure", 5)
            found.append(learner(inputs))
        assert gradients or len(linearizations) == 0
    assert torch.equal(*found)
