"""What is known of an inner problem where no hypergradient is asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat
from small_task import HOWS, adapt
from torch import Tensor, nn

from l2l_implicit import (
    LBFGS,
    Diagnostics,
    Direct,
    GaussNewton,
    GradientDescent,
    ImplicitCGHead,
    Newton,
    UnsolvedWarning,
)
from l2l_implicit.inner_problem.linear_heads import LinearHeads
from l2l_implicit.inner_problem.linearization import AutogradLinearization

pytestmark = pytest.mark.usefixtures("float64")
Y, L2 = torch.arange(12) % 3, 0.2
NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "deep": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
}
SOLVERS: dict[str, dict[str, Any]] = {
    "newton": {"inner": Newton()},
    "gauss-newton": {"inner": Newton(), "curvature": GaussNewton()},
    "gradient": {"inner": GradientDescent(), "lr": 0.5},
    "lbfgs": {"inner": LBFGS()},
    "diverging": {"inner": GradientDescent(), "lr": 9.0},
}


def learner_of(net: str, solver: str, **more: Any) -> ImplicitCGHead:
    settings = {"lr": 0.1, "l2": L2, **SOLVERS[solver], **more}
    return ImplicitCGHead(NETS[net](), **settings)


def support(learner: ImplicitCGHead, x: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(learner(x), Y)


def gradient_norm(learner: ImplicitCGHead, x: Tensor) -> float:
    """Of the inner objective where the learner is, by autograd on a copy."""
    module = NETS["linear" if len(list(learner.parameters())) == 2 else "deep"]()
    module.load_state_dict({k: v.detach() for k, v in learner.module.state_dict().items()})
    parameters = [*module.parameters()]
    penalty = sum(p.square().sum() for p in parameters)
    objective = F.cross_entropy(module(x), Y) + 0.5 * L2 * penalty
    return float(flat(torch.autograd.grad(objective, parameters)).norm())


def assert_no_backward(found: Diagnostics) -> None:
    """What only a linear system can tell."""
    assert math.isnan(found.hypergradient_error) and math.isnan(found.cg_residual)
    assert (found.cg_steps, found.cg_reason, found.is_bound) == (0, "", False)
    assert (found.hypergradients, found.unsolved, found.unsolved_linear) == (0, 0, 0)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("net", NETS)
def test_without_gradients_the_inner_part_is_there(net: str, solver: str, steps: int) -> None:
    """The norm at the very parameters that the queries will see; said once, counted each time."""
    parent, x = learner_of(net, solver), torch.randn(12, 4)
    bad = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turn in range(2):
            with torch.no_grad():
                learner = parent.clone()
                learner.adapt(support(learner, x * (1 + turn)), steps=steps)
            found, norm = learner.diagnostics, gradient_norm(learner, x * (1 + turn))
            size = L2 * float(flat(learner.parameters()).norm())  # the estimate's scale
            bad += found.unsolved_inner
            if not (net == "linear" and solver == "newton"):  # whose error is a bound
                if net == "deep":
                    assert found.unsolved_inner == (norm > 0.01 * size)
            else:
                assert found.unsolved_inner == 0
            for each in (found, parent.diagnostics):
                assert each.inner_gradient_norm == pytest.approx(norm, rel=1e-8, abs=1e-10)
                assert 0 < each.inner_steps and each.inner_steps == found.inner_steps
                assert_no_backward(each)
    assert parent.diagnostics.unsolved_inner == bad
    said = [str(w.message) for w in caught if issubclass(w.category, UnsolvedWarning)]
    assert len(said) == (bad > 0)
    assert not bad or "\n" not in said[0] and "the inner problem is not solved" in said[0]
    assert bad == 2 or solver not in ("gradient", "diverging") or steps > 1


def test_a_parent_keeps_what_its_last_hypergradient_said() -> None:
    parent, x = learner_of("linear", "newton"), torch.randn(12, 4)
    learner = parent.clone()
    learner.adapt(support(learner, x.requires_grad_()), steps=4)
    learner(x).square().sum().backward()
    trained = parent.diagnostics.hypergradient_error
    assert trained < 0.01 and parent.diagnostics.is_bound
    with torch.no_grad():
        tested = parent.clone()
        tested.adapt(support(tested, 2.0 * x), steps=4)
    assert_no_backward(tested.diagnostics)
    assert parent.diagnostics.hypergradient_error == trained and parent.diagnostics.is_bound
    assert parent.diagnostics.inner_gradient_norm == tested.diagnostics.inner_gradient_norm


@HOWS
@pytest.mark.parametrize("net", NETS)
def test_with_gradients_but_no_backward_the_next_task_says_it(net: str, how: str) -> None:
    """As learn2learn's scripts evaluate; five steps are one inner problem."""
    parent, x = learner_of(net, "gradient", lr=0.01), torch.randn(12, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a backward() may still come
        learner = parent.clone()
        adapt(learner, support(learner, x), how, 5)
        assert_no_backward(learner.diagnostics)
        assert learner.diagnostics.inner_steps == 5
        assert learner.diagnostics.unsolved_inner == parent.diagnostics.unsolved_inner == 1
    with pytest.warns(UnsolvedWarning, match="after 5 steps of GradientDescent"):
        learner = parent.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(learner, support(learner, x), how, 5)
        parent.clone()
    assert parent.diagnostics.unsolved_inner == 2


@HOWS
def test_more_steps_of_the_same_task_may_solve_it(how: str) -> None:
    parent, x = learner_of("linear", "gradient", lr=1.0), torch.randn(12, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner = parent.clone()
        adapt(learner, support(learner, x), how, 2)
        assert parent.diagnostics.unsolved_inner == 1
        adapt(learner, support(learner, x), how, 200)
        assert parent.diagnostics.unsolved_inner == learner.diagnostics.unsolved_inner == 0
        parent.clone()


@HOWS
def test_in_training_nothing_is_counted_or_said_twice(how: str) -> None:
    parent, x = learner_of("deep", "gradient", lr=0.01, linear=Direct()), torch.randn(12, 4)
    leaf = x.clone().requires_grad_()
    with pytest.warns(UnsolvedWarning) as caught:
        for _ in range(3):
            learner = parent.clone()
            adapt(learner, support(learner, leaf), how, 3)
            F.cross_entropy(learner(leaf), Y.roll(1)).backward()
    found = parent.diagnostics
    assert len([w for w in caught if w.category is UnsolvedWarning]) == 1
    assert found.unsolved_inner == found.unsolved == found.hypergradients == 3
    with warnings.catch_warnings(), torch.no_grad():  # a test after it: said already
        warnings.simplefilter("error")
        learner = parent.clone()
        learner.adapt(support(learner, x), steps=3)
        parent.clone()
    assert (found.unsolved_inner, found.unsolved) == (4, 3)


def test_several_tasks_before_one_backward() -> None:
    parent, x = learner_of("linear", "gradient", lr=0.01), torch.randn(12, 4).requires_grad_()
    learners = [parent.clone() for _ in range(3)]
    for learner in learners:
        learner.adapt(support(learner, x), steps=2)
    assert parent.diagnostics.unsolved_inner == 3
    with pytest.warns(UnsolvedWarning) as caught:
        sum(F.cross_entropy(n(x), Y.roll(1)) for n in learners).backward()
    assert len(caught) == 1 and parent.diagnostics.unsolved_inner == 3


@pytest.mark.parametrize("steps", [1, 200])
@pytest.mark.parametrize("grad", [True, False])
def test_together_each_task_has_its_own(grad: bool, steps: int) -> None:
    parent, x = learner_of("linear", "gradient", lr=0.3), torch.randn(3, 12, 4)
    x[1] = 0.0  # nothing to learn for a head of zeros
    for p in parent.parameters():
        nn.init.zeros_(p)
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(grad):
        warnings.simplefilter("always")
        adapted = parent.adapt_together(x, Y.expand(3, -1), steps)
        parent.clone()
    norms = [found.inner_gradient_norm for found in adapted.diagnostics]
    for t, found in enumerate(adapted.diagnostics):
        module = parent.clone()
        values = {"weight": adapted.weight[t].detach(), "bias": adapted.bias[t].detach()}
        module.module.load_state_dict(values)
        assert norms[t] == pytest.approx(gradient_norm(module, x[t]), rel=1e-8, abs=1e-13)
        assert_no_backward(found)
    unsolved = sum(found.unsolved_inner for found in adapted.diagnostics)
    assert parent.diagnostics.unsolved_inner == unsolved == (2 if steps == 1 else 0)
    assert len([w for w in caught if w.category is UnsolvedWarning]) == (unsolved > 0)


@pytest.mark.parametrize("net", NETS)
def test_training_measures_once_and_computes_no_further_loss(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What adapt() has measured the backward pass takes; under no_grad there is one gradient more
    than there are steps, as in training."""
    measured, calls = [], 0
    for cls in (LinearHeads, AutogradLinearization):
        own = cls.scales
        monkeypatch.setattr(cls, "scales", lambda s, own=own: measured.append(s) or own(s))
    parent, x = learner_of(net, "gradient", max_error=1e9), torch.randn(12, 4).requires_grad_()
    counted = []
    for grad in (True, False):
        learner, calls = parent.clone(), 0

        def loss(learner: ImplicitCGHead = learner) -> Tensor:
            nonlocal calls
            calls += 1
            return F.cross_entropy(learner(x), Y)

        with torch.set_grad_enabled(grad):
            learner.adapt(loss, steps=4)
        counted.append(calls)
        if grad:
            learner(x).square().sum().backward()
            assert len(measured) == 1
    assert len(measured) == 2 and counted[1] <= counted[0]
    assert counted[1] == (2 if net == "linear" else 5)


def test_a_warning_that_is_an_error_leaves_the_adapted_learner() -> None:
    parent, x = learner_of("linear", "gradient", lr=0.01), torch.randn(12, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UnsolvedWarning)
        learner = parent.clone()
        with pytest.raises(UnsolvedWarning):
            learner.adapt(support(learner, x), steps=1)
    assert not torch.equal(flat(learner.parameters()), flat(parent.parameters()))
    assert parent.diagnostics.unsolved_inner == 1
