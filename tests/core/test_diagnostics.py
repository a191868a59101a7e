"""What the learner says when a problem was not solved, and that it says nothing when it was."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat
from small_task import HOWS, adapt
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    LBFGS,
    Diagnostics,
    Direct,
    GradientDescent,
    ImplicitCGHead,
    Neumann,
    Newton,
    UnsolvedWarning,
)
from l2l_implicit.inner_problem import linear_heads
from l2l_implicit.inner_problem.linearization import Sizes
from l2l_implicit.inner_solvers.protocol import InnerSolver
from l2l_implicit.linear_solvers.solution import CONVERGED, FACTORED, MAX_STEPS

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.arange(25) % 5


def data(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(25, 10)


def run(parent: ImplicitCGHead, x: Tensor, steps: int, how: str = "loss") -> ImplicitCGHead:
    """One task: adapt and back-propagate."""
    learner = parent.clone()
    x = x if x.requires_grad else x.clone().requires_grad_()

    def loss() -> Tensor:
        return F.cross_entropy(learner(x), Y)

    adapt(learner, loss, how, steps)
    F.cross_entropy(learner(x), Y.roll(1)).backward()
    return learner


def head(**settings) -> ImplicitCGHead:
    return ImplicitCGHead(nn.Linear(10, 5), **{"lr": 0.1, "linear": CG(60), **settings})


@HOWS
@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize(
    "inner, steps", [(Newton(), 10), (Newton(), 1), (GradientDescent(), 100), (LBFGS(), 40)]
)
def test_solved_says_nothing(inner: InnerSolver, steps: int, anchor: str, how: str) -> None:
    parent = head(inner=inner, lr=1.0, anchor=anchor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
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


def test_reported_gradient_is_that_of_the_objective() -> None:
    parent, x = head(inner=GradientDescent(), lr=0.3, l2=0.2, max_error=1e9), data()
    learner = run(parent, x, 4, "closure")
    objective = F.cross_entropy(learner(x), Y) + 0.1 * sum(
        p.square().sum() for p in learner.parameters()
    )
    slopes = torch.autograd.grad(objective, list(learner.parameters()))
    norm = float(flat(slopes).norm())
    assert parent.diagnostics.inner_gradient_norm == pytest.approx(norm, rel=1e-12)


def of_features(x: Tensor, query: Tensor, l2: float = 0.1) -> tuple[Tensor, Diagnostics]:
    """The hypergradient of support features in their dtype, and what is said of it."""
    leaf = x.clone().requires_grad_()
    module = nn.Linear(x.shape[1], 5, dtype=x.dtype)
    learner = ImplicitCGHead(module, 0.1, l2=l2, max_error=1e9).clone()
    learner.adapt(F.cross_entropy(learner(leaf), Y))
    F.cross_entropy(learner(query), Y.roll(1)).backward()
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
    module = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 5))
    parent = ImplicitCGHead(module, 0.1, l2=2.0, inner=GradientDescent(), linear=CG(200, 1e-12))
    with pytest.warns(UnsolvedWarning, match="inner problem is not solved"):
        learner = run(parent, data(), 2, "closure")
    said = learner.diagnostics
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            learner.adapt(F.mse_loss(learner(x) * (1 + 1e-15), target))
        learner(x).square().sum().backward()


def test_a_warm_start_with_ones_own_regularizer_says_nothing() -> None:
    """The second visit starts at the solution, where the first gradient is tiny already."""

    class Own(ImplicitCGHead):
        def regularizer(self, parameters, anchor):
            return 0.05 * sum((p - a).square().sum() for p, a in zip(parameters, anchor))  # noqa: B905

    parent, x = Own(nn.Linear(10, 5), 0.1, warm_start=True, linear=CG(60)), data().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            learner = parent.clone(task="a")
            learner.adapt(lambda: F.cross_entropy(learner(x), Y), steps=15)  # noqa: B023
            F.cross_entropy(learner(x), Y.roll(1)).backward()
    assert parent.diagnostics.unsolved_inner == 0
