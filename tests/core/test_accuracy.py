"""`accuracy`: both solvers end where the hypergradient's error is small enough, and not before."""

from typing import Any

import pytest
import torch
from oracles import relative_error
from problems import Problem, adapt, hypergradient, make_learner, problem, truth
from several_tasks import Batch, assert_alike
from small_task import HOWS, silent
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GradientDescent,
    ImplicitCGHead,
    InnerSolver,
    InnerStep,
    Jacobi,
    LinearSolver,
    Neumann,
    Newton,
    UnsolvedWarning,
)
from l2l_implicit.linear_solvers.solution import CONVERGED, System

pytestmark = pytest.mark.usefixtures("float64")
HEADS = ["softmax mean bias", "anchored softmax", "ridge mean"]
ACCURACIES = [1e-1, 1e-3, 1e-6]
MOST = 300  # steps, which nothing here needs


class Own:
    """An inner solver of one's own, which knows nothing of accuracies."""

    def begin(self, lr: float) -> InnerStep:
        return lambda at: at.point - lr * at.gradient


INNER: dict[str, InnerSolver] = {
    "gradient": GradientDescent(), "tolerance": GradientDescent(tol=0.5), "own": Own(),
    "lbfgs": LBFGS(tol=0.5),
}  # fmt: skip
LINEAR: list[LinearSolver] = [
    CG(1000, 0.5), Neumann(3000, 0.5), CG(1000, 0.5, preconditioner=Jacobi()), Direct()
]  # fmt: skip


def solved(task: Problem, how: str = "closure", **settings: Any) -> tuple[Any, list[Tensor]]:
    """The learner, having said nothing, and the hypergradient."""
    parent = make_learner(task, **{"linear": LINEAR[0], **settings})
    with silent(UnsolvedWarning):
        learner, loss = adapt(parent, task, how, MOST)
        return learner, hypergradient(task, loss)


@HOWS
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_as_accurate_as_asked_and_steps_follow(name: str, inner: str, how: str) -> None:
    """The solvers' own tolerances, far too large, stand idle."""
    steps = []
    for accuracy in ACCURACIES:
        learner, got = solved(problem(name), how, inner=INNER[inner], accuracy=accuracy)
        said = learner.diagnostics
        assert relative_error(got, truth(name)) <= said.hypergradient_error <= accuracy
        assert said.cg_reason == CONVERGED and said.unsolved == 0
        steps.append((said.inner_steps, said.cg_steps))
    assert steps == sorted(steps) and steps[0][0] < steps[-1][0] < MOST
    assert steps[0][1] < steps[-1][1]


@pytest.mark.parametrize("linear", LINEAR, ids=repr)
@pytest.mark.parametrize("name", ["two layers anchored", "whole network"])
def test_a_network_ends_where_its_estimate_says(name: str, linear: LinearSolver) -> None:
    errors = []
    for accuracy in ACCURACIES:
        task = problem(name)
        learner, got = solved(task, inner=GradientDescent(), linear=linear, accuracy=accuracy)
        said = learner.diagnostics
        assert said.hypergradient_error <= accuracy and not said.is_bound
        errors.append(relative_error(got, truth(name)))
        assert errors[-1] < 10 * accuracy
    assert errors[-1] < 1e-5 < errors[0]


@HOWS
@pytest.mark.parametrize("name", [HEADS[0], "two layers anchored"])
def test_further_calls_change_nothing(name: str, how: str) -> None:
    task = problem(name)
    parent = make_learner(task, inner=GradientDescent(), accuracy=1e-2)
    learner, _ = adapt(parent, task, how, MOST)
    theta = {**task.theta, "initial": next(iter(task.head.parameters()))}
    before = [p.detach().clone() for p in learner.parameters()]
    learner.adapt(task.support(learner, theta, task.embed(theta)))
    learner.adapt(lambda: task.support(learner, theta, task.embed(theta)), steps=5)
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters(), before, strict=True))


@pytest.mark.parametrize("inner", [GradientDescent(), LBFGS(), Newton()], ids=repr)
def test_heads_together_end_each_where_it_would_alone(inner: InnerSolver) -> None:
    settings = {"inner": inner, "linear": CG(100), "accuracy": 1e-2}
    said = assert_alike(Batch(), 1000, 1e-9, **settings)  # of tasks that are not equally hard
    assert len({each.inner_steps for each in said}) > 1 or isinstance(inner, Newton)
    assert not any(each.unsolved for each in said)


@pytest.mark.parametrize("steps, linear", [(2, CG(1000)), (1000, CG(2))], ids=["K", "N"])
def test_what_the_steps_do_not_reach_is_said(steps: int, linear: LinearSolver) -> None:
    """The steps that the user gave are the most; and the limit is the accuracy."""
    task = problem(HEADS[0])
    parent = make_learner(task, inner=GradientDescent(), linear=linear, accuracy=1e-3)
    with pytest.warns(UnsolvedWarning, match=r"of the hypergradient of at most 0\.001, got"):
        learner, loss = adapt(parent, task, steps=steps)
        loss.backward()
    assert learner.diagnostics.inner_steps == steps or learner.diagnostics.cg_steps == 2
    assert learner.diagnostics.unsolved == 1


def test_max_error_is_the_accuracy_unless_it_is_given() -> None:
    def limit(**settings: Any) -> float:
        return ImplicitCGHead(nn.Linear(2, 2), 0.1, **settings).max_error

    assert (limit(), limit(accuracy=0.1), limit(accuracy=1e-3)) == (0.01, 0.1, 1e-3)
    assert limit(accuracy=1e-3, max_error=0.5) == 0.5


@pytest.mark.parametrize("solver", LINEAR[:3], ids=repr)
@pytest.mark.parametrize("accuracy", ACCURACIES)
def test_the_linear_solvers_stop_at_the_error_of_the_solution(
    solver: LinearSolver, accuracy: float
) -> None:
    """Above the residual's size by up to the condition number; in a batch each task by itself."""
    values = torch.stack([torch.logspace(-1, 1, 8), torch.logspace(-2, 0, 8) + 0.09])
    system = System(lambda p: p * (values - 0.1), damping=0.1, accuracy=accuracy)
    b = torch.randn(2, 8)
    got = solver.solve(system, b)
    error = (got.solution - b / values).norm(dim=1) / got.solution.norm(dim=1)
    assert got.reason == [CONVERGED] * 2 and bool((error <= accuracy).all())
    fewer = solver.solve(System(lambda p: p * values, accuracy=100 * accuracy), b)
    assert bool((fewer.steps <= got.steps).all())  # without l2 it is the residual's
