"""What is said of a problem that was not solved, with a hypergradient and without; else nothing."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat
from problems import on_vector
from small_task import HOWS, adapt, silent
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    LBFGS,
    Diagnostics,
    Direct,
    GaussNewton,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    Neumann,
    Newton,
    Perturbed,
    UnsolvedWarning,
)
from l2l_implicit.inner_problem import linear_heads
from l2l_implicit.inner_problem.linear_heads import LinearHeads
from l2l_implicit.inner_problem.linearization import AutogradLinearization, Sizes
from l2l_implicit.inner_solvers.protocol import InnerSolver
from l2l_implicit.linear_solvers.solution import CONVERGED, FACTORED, MAX_STEPS

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.arange(25) % 5
NETS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(10, 5),
    "deep": lambda: nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 5)),
}


def data(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(25, 10)


def head(net: str = "linear", **settings: Any) -> ImplicitCGHead:
    return ImplicitCGHead(NETS[net](), **{"lr": 0.1, "linear": CG(60), **settings})


def support(learner: ImplicitCGHead, x: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(learner(x), Y)


def adapted(parent: ImplicitCGHead, x: Tensor, steps: int, how: str = "closure") -> ImplicitCGHead:
    learner = parent.clone()
    adapt(learner, support(learner, x), how, steps)
    return learner


def query_loss(learner: ImplicitCGHead, x: Tensor) -> Tensor:
    return F.cross_entropy(learner(x), Y.roll(1))


def run(parent: ImplicitCGHead, x: Tensor, steps: int, how: str = "loss") -> ImplicitCGHead:
    """One task: adapt and back-propagate."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    learner = adapted(parent, x, steps, how)
    query_loss(learner, x).backward()
    return learner


def gradient_norm(learner: ImplicitCGHead, x: Tensor, l2: float) -> float:
    """Of the inner objective where the learner is."""

    def objective(phi: Tensor) -> Tensor:
        outputs = on_vector(learner.module, phi)(x)
        return F.cross_entropy(outputs, Y) + 0.5 * l2 * phi.square().sum()

    return float(torch.func.grad(objective)(flat(learner.parameters())).norm())


@HOWS
@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize(
    "inner, steps", [(Newton(), 10), (Newton(), 1), (GradientDescent(), 100), (LBFGS(), 40)]
)
def test_solved_says_nothing(inner: InnerSolver, steps: int, anchor: str, how: str) -> None:
    parent = head(inner=inner, lr=1.0, anchor=anchor)
    with silent():
        learner = run(parent, data(), steps, how)
    for found in (learner.diagnostics, parent.diagnostics):
        assert (found.hypergradients, found.unsolved) == (1, 0)
        assert (found.unsolved_inner, found.unsolved_linear) == (0, 0)
        assert 0 < found.inner_steps and 0.0 <= found.hypergradient_error <= 0.01
        assert found.is_bound == isinstance(inner, Newton) and found.cg_residual <= 1e-4
        if isinstance(inner, Newton):
            assert (found.cg_steps, found.cg_reason) == (0, FACTORED)
        else:
            assert found.inner_steps <= steps and 0 < found.cg_steps <= 60
            assert found.cg_reason == CONVERGED


@pytest.mark.parametrize("linear", [CG(), Direct(), Neumann(300), CG(60)], ids=repr)
def test_a_bound_is_claimed_for_the_factor_alone(linear: Any) -> None:
    """Another solver's v may be near in phi and less so in theta."""
    parent = head(linear=linear)
    run(parent, data(), 1)
    assert parent.diagnostics.is_bound == (parent.diagnostics.cg_reason == FACTORED)
    assert parent.diagnostics.is_bound == (not isinstance(linear, Neumann))


CASES: dict[str, tuple[str, dict[str, Any], float, int]] = {
    "too few steps": ("inner", {"inner": GradientDescent(), "lr": 0.01}, 1.0, 3),
    "diverging": ("inner", {"inner": GradientDescent(), "lr": 5.0}, 5.0, 10),
    "one step of l-bfgs": ("inner", {"inner": LBFGS()}, 20.0, 1),
    "one product": ("linear", {"inner": LBFGS(tol=1e-10), "linear": CG(1), "l2": 1e-2}, 5.0, 200),
}
REMEDIES = {"inner": "use inner=Newton()", "linear": "give linear= more steps"}


def test_the_advice_without_second_derivatives_can_be_taken() -> None:
    """Newton's method is none of them on a network."""
    x = data()
    for solver, steps in ((GradientDescent(), 1), (LBFGS(), 1), (LBFGS(), 300)):
        net = NETS["deep"]()
        parent = ImplicitMAML(net, 0.01, l2=1.0, inner=solver, linear=Perturbed())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(parent, x, steps, "closure")
        assert [w for w in caught if "use inner=LBFGS() and more steps" in str(w.message)] == caught
        assert bool(caught) == (steps == 1)


@HOWS
@pytest.mark.parametrize("case", CASES)
def test_unsolved_warns_once_and_counts(case: str, how: str) -> None:
    what, settings, scale, steps = CASES[case]
    parent, x = head(**settings), data(scale)
    message = f"the {what} (problem|system) is not solved"
    with pytest.warns(UnsolvedWarning, match=message) as caught:
        for _ in range(3):
            learner = run(parent, x, steps, how)
    assert len(caught) == 1
    found, counted = parent.diagnostics, f"unsolved_{what}"
    assert getattr(found, counted) == found.unsolved == found.hypergradients == 3
    assert found.unsolved_inner + found.unsolved_linear == 3
    assert getattr(learner.diagnostics, counted) == 1 and found.hypergradient_error > 0.1
    text = str(caught[0].message)
    assert "\n" not in text and REMEDIES[what] in text
    assert f"steps of {settings[what]}" in text, "what is set is not named"
    if what == "linear":
        assert found.cg_reason == MAX_STEPS and found.cg_steps == 1


# How wrong: a bound for a linear head, else an estimate.


def of_features(x: Tensor, query: Tensor, l2: float = 0.1) -> tuple[Tensor, Diagnostics]:
    """The hypergradient of support features in their dtype, and what is said of it."""
    leaf = x.clone().requires_grad_()
    module = nn.Linear(x.shape[1], 5, dtype=x.dtype)
    learner = ImplicitCGHead(module, 0.1, l2=l2, max_error=1e9).clone()
    learner.adapt(F.cross_entropy(learner(leaf), Y))
    query_loss(learner, query).backward()
    return leaf.grad.double(), learner.diagnostics  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 3, 4, 5])
def test_the_bound_holds_before_the_minimum(
    steps: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Newton's method had to end too early."""
    x, query = data(scale), data(scale)
    expected, solved = of_features(x, query)
    assert solved.hypergradient_error < 1e-11
    monkeypatch.setattr(linear_heads, "_MOST_STEPS", steps)
    found, said = of_features(x, query)
    error = float((found - expected).norm() / expected.norm())
    assert said.is_bound and error <= said.hypergradient_error
    assert error < 1e-10 or said.inner_gradient_norm > 1e3 * solved.inner_gradient_norm


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_the_bound_holds_for_rounded_numbers(scale: float, l2: float) -> None:
    """By float64's hypergradient of the same data."""
    x, query = data(scale).float(), data(scale).float()
    expected, _ = of_features(x.double(), query.double(), l2)
    found, said = of_features(x, query, l2)
    error = float((found - expected).norm() / expected.norm())
    assert said.is_bound and 0.0 < error <= said.hypergradient_error


def test_the_estimate_is_the_distance_from_the_minimum() -> None:
    """Of a network: its gradient over l2, relative to the distance from the anchor."""
    parent, x = head("deep", l2=2.0, inner=GradientDescent(), linear=CG(200, 1e-12)), data()
    with pytest.warns(UnsolvedWarning, match="inner problem is not solved"):
        learner = run(parent, x, 2, "closure")
    said = learner.diagnostics
    assert said.inner_gradient_norm == pytest.approx(gradient_norm(learner, x, 2.0), rel=1e-12)
    expected = said.inner_gradient_norm / (2.0 * float(flat(learner.parameters()).norm()))
    assert not said.is_bound and said.unsolved_inner == 1
    assert said.hypergradient_error == pytest.approx(expected, rel=1e-6)


def test_a_solution_that_is_too_long_makes_the_estimate_larger() -> None:
    """H = diag(4, 0.1) with l2 = 1: b along the second is solved by ten times b."""
    module, curvatures = nn.Linear(2, 1, bias=False), torch.tensor([3.0, -0.9])
    nn.init.constant_(module.weight, 0.3)
    solvers = {"inner": GradientDescent(), "linear": Direct()}
    for query, factor in ((torch.tensor([0.0, 1.0]), 10.0), (torch.tensor([1.0, 0.0]), 1.0)):
        learner = ImplicitCGHead(module, 0.1, l2=1.0, max_error=1e9, **solvers).clone()

        def loss(learner: ImplicitCGHead = learner) -> Tensor:
            phi = learner.module.weight[0]
            return 0.5 * (curvatures * phi.square()).sum() - phi.sum()

        learner.adapt(loss, steps=3)
        (learner.module.weight[0] * query).sum().backward()
        said = learner.diagnostics
        plain = said.inner_gradient_norm / float(flat(learner.parameters()).norm())
        assert said.hypergradient_error == pytest.approx(factor * plain, rel=1e-9)


def test_without_a_regulariser_the_estimate_is_the_gradient_relative_to_the_first() -> None:
    """Where no closed form knows the span's curvature (`test_no_regulariser` of never_silent)."""
    x, y, module = data(), torch.randn(25, 5), nn.Linear(10, 5)
    solvers = {"inner": GradientDescent(), "linear": Direct()}
    learner = ImplicitCGHead(module, 0.1, l2=0.0, max_error=1e9, **solvers).clone()
    first = torch.autograd.grad(F.mse_loss(module(x), y), [*module.parameters()])
    learner.adapt(lambda: 1.0 * F.mse_loss(learner(x), y), steps=2)
    learner(x).square().sum().backward()
    expected = learner.diagnostics.inner_gradient_norm / float(flat(first).norm())
    assert learner.diagnostics.hypergradient_error == pytest.approx(expected, rel=1e-6)


def test_the_linear_part_bounds_the_systems_error() -> None:
    """What is left of the residual lies where the matrix is weakest."""
    a, b = torch.logspace(-3, 0, 20), torch.randn(1, 20)
    underrated = 0
    for steps in range(1, 15):
        answer, exact = CG(steps, tol=1e-12).solve(lambda p: a * p, b), b / a
        residual, size = float(answer.relative_residual), float(answer.solution.norm())
        sizes = Sizes(0.0, 0.0, residual, float(b.norm()), size, ())
        error = float((answer.solution - exact).norm()) / size
        assert error <= sizes.linear_error(1e-3)
        underrated += residual < error
    assert underrated > 5


def test_clones_of_clones_report_to_every_parent_and_to_no_other() -> None:
    parent, other, x = head(), head(), data()
    first = parent.clone()
    run(first, x, 5)
    assert parent.diagnostics.hypergradients == first.diagnostics.hypergradients == 1
    run(parent, x, 5)
    assert parent.diagnostics.hypergradients == 2 and first.diagnostics.hypergradients == 1
    assert other.diagnostics.hypergradients == 0


def test_a_task_solved_from_the_start_says_nothing() -> None:
    """Its first gradient is rounding already; falling no further is no failure."""
    x, module = torch.randn(8, 3), nn.Linear(3, 2)
    target = module(x).detach()
    learner = ImplicitCGHead(module, 0.1, anchor="init").clone()
    with silent():
        for _ in range(3):
            learner.adapt(F.mse_loss(learner(x) * (1 + 1e-15), target))
        learner(x).square().sum().backward()


# Where no hypergradient is asked for.


SOLVERS: dict[str, dict[str, Any]] = {
    "newton": {"inner": Newton()},
    "gauss-newton": {"inner": Newton(), "curvature": GaussNewton()},
    "gradient": {"inner": GradientDescent(), "lr": 0.5},
    "lbfgs": {"inner": LBFGS()},
    "diverging": {"inner": GradientDescent(), "lr": 9.0},
}
SLOW = {"inner": GradientDescent(), "lr": 0.01, "l2": 0.2}


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
    parent, x = head(net, l2=0.2, **SOLVERS[solver]), data()
    bad = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turn in range(2):
            with torch.no_grad():
                learner = adapted(parent, x * (1 + turn), steps)
            found, norm = learner.diagnostics, gradient_norm(learner, x * (1 + turn), 0.2)
            size = 0.2 * float(flat(learner.parameters()).norm())  # the estimate's scale
            bad += found.unsolved_inner
            if net == "deep":  # of a linear head Newton's error is a bound
                assert found.unsolved_inner == (norm > 0.01 * size)
            assert found.unsolved_inner == 0 or (net, solver) != ("linear", "newton")
            for each in (found, parent.diagnostics):
                assert each.inner_gradient_norm == pytest.approx(norm, rel=1e-8, abs=1e-10)
                assert 0 < each.inner_steps and each.inner_steps == found.inner_steps
                assert_no_backward(each)
    assert parent.diagnostics.unsolved_inner == bad
    said = [str(w.message) for w in caught if issubclass(w.category, UnsolvedWarning)]
    assert len(said) == (bad > 0)
    for text in said:  # an estimate, and called so
        assert re.search("^the inner problem is not solved.*got (about|one that)[^\n]*$", text)
    assert bad == 2 or solver not in ("gradient", "diverging") or steps > 1


def test_a_parent_keeps_what_its_last_hypergradient_said() -> None:
    parent, x = head(), data()
    run(parent, x, 4)
    trained = parent.diagnostics.hypergradient_error
    assert trained < 0.01 and parent.diagnostics.is_bound
    with torch.no_grad():
        tested = adapted(parent, 2.0 * x, 4)
    assert_no_backward(tested.diagnostics)
    assert parent.diagnostics.hypergradient_error == trained and parent.diagnostics.is_bound
    assert parent.diagnostics.inner_gradient_norm == tested.diagnostics.inner_gradient_norm


@HOWS
@pytest.mark.parametrize("net", NETS)
def test_with_gradients_but_no_backward_the_next_task_says_it(net: str, how: str) -> None:
    """As learn2learn's scripts evaluate; five steps are one inner problem."""
    parent, x = head(net, **SLOW), data()
    with silent():  # a backward() may still come
        learner = adapted(parent, x, 5, how)
        assert_no_backward(learner.diagnostics)
        assert learner.diagnostics.inner_steps == 5
        assert learner.diagnostics.unsolved_inner == parent.diagnostics.unsolved_inner == 1
    with pytest.warns(UnsolvedWarning, match="after 5 steps of GradientDescent"):
        learner = parent.clone()
    with silent():
        adapt(learner, support(learner, x), how, 5)
        parent.clone()
    assert parent.diagnostics.unsolved_inner == 2


@HOWS
def test_more_steps_of_the_same_task_may_solve_it(how: str) -> None:
    parent, x = head(inner=GradientDescent(), lr=1.0, l2=0.2), data()
    with silent():
        learner = adapted(parent, x, 2, how)
        assert parent.diagnostics.unsolved_inner == 1
        adapt(learner, support(learner, x), how, 200)
        assert parent.diagnostics.unsolved_inner == learner.diagnostics.unsolved_inner == 0
        parent.clone()


@HOWS
def test_in_training_nothing_is_counted_or_said_twice(how: str) -> None:
    parent, x = head("deep", **SLOW, linear=Direct()), data()
    with pytest.warns(UnsolvedWarning) as caught:
        for _ in range(3):
            run(parent, x, 3, how)
    found = parent.diagnostics
    assert len([w for w in caught if w.category is UnsolvedWarning]) == 1
    assert found.unsolved_inner == found.unsolved == found.hypergradients == 3
    with silent(), torch.no_grad():  # a test after it: said already
        adapted(parent, x, 3)
        parent.clone()
    assert (found.unsolved_inner, found.unsolved) == (4, 3)


@pytest.mark.parametrize("net, gradients", [("linear", 2), ("deep", 5)])
def test_training_measures_once_and_computes_no_further_loss(
    net: str, gradients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What adapt() has measured the backward pass takes; under no_grad there is one gradient more
    than there are steps, as in training."""
    measured, counted = [], []
    for cls in (LinearHeads, AutogradLinearization):
        own = cls.scales
        monkeypatch.setattr(cls, "scales", lambda s, own=own: measured.append(s) or own(s))
    parent, x = head(net, inner=GradientDescent(), max_error=1e9), data().requires_grad_()
    for grad in (True, False):
        learner, calls = parent.clone(), []
        loss = support(learner, x)
        with torch.set_grad_enabled(grad):
            learner.adapt(lambda: calls.append(1) or loss(), steps=4)  # noqa: B023
        counted.append(len(calls))
        if grad:
            learner(x).square().sum().backward()
            assert len(measured) == 1
    assert len(measured) == 2 and gradients == counted[1] <= counted[0]


def test_a_warning_that_is_an_error_leaves_the_adapted_learner() -> None:
    parent, x = head(**SLOW), data()
    with silent(UnsolvedWarning), torch.no_grad():
        learner = parent.clone()
        with pytest.raises(UnsolvedWarning):
            learner.adapt(support(learner, x), steps=1)
    assert not torch.equal(flat(learner.parameters()), flat(parent.parameters()))
    assert parent.diagnostics.unsolved_inner == 1
