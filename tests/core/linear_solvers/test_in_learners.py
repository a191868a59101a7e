"""Damped systems and one-step differentiation, of whole learners against dense oracles.

Bolte, Pauwels, Vaiter (2023): the derivative of the last step of Newton's method is the implicit
gradient in the limit; that of gradient descent misses the rate at which a step contracts.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracles import flat, implicit, relative_error
from problems import (
    EXACT,
    NAMES,
    Problem,
    adapt,
    hypergradient,
    make_learner,
    minimum,
    problem,
    truth,
)  # fmt: skip
from torch import Tensor
from torch.func import grad, hessian

from l2l_implicit import (
    CG,
    Direct,
    GradientDescent,
    Identity,
    LinearSolver,
    Neumann,
    Newton,
)  # fmt: skip
from l2l_implicit.linear_solvers.solution import APPROXIMATED, FACTORED

exact = pytest.mark.usefixtures("float64")
DAMPING = 0.7


# Damping.


@exact
@pytest.mark.parametrize("name", NAMES)
def test_the_damped_system_is_solved(name: str) -> None:
    task = problem(name)
    _, loss = adapt(make_learner(task, linear=replace(EXACT["linear"], damping=DAMPING)), task)
    got = hypergradient(task, loss)
    assert relative_error(got, truth(name, DAMPING)) < 1e-9
    assert relative_error(got, truth(name)) > 1e-3


@exact
@pytest.mark.parametrize(
    "linear", [CG(3000, 1e-13, 2.0), Neumann(3000, 1e-13, damping=2.0), Direct(2.0)]
)
def test_where_the_matrix_is_indefinite(linear: LinearSolver) -> None:
    task = problem("two layers anchored", l2=0.0)
    task.theta["l2"] = torch.tensor(0.0, requires_grad=True)
    parent = make_learner(task, inner=GradientDescent(), linear=linear)
    learner, loss = adapt(parent, task, steps=2)
    phi = flat(learner.module.parameters())
    leaves = [t.detach() for t in task.leaves()]
    assert torch.linalg.eigvalsh(hessian(task.inner)(phi, *leaves))[0] < -1e-3
    got = hypergradient(task, loss)
    assert relative_error(got, implicit(task.inner, task.outer, task.leaves(), phi, 2.0)) < 1e-9
    assert learner.diagnostics.unsolved_linear == 0


# One step.


HEADS = ["softmax mean bias", "anchored softmax", "ridge mean"]
Step = Callable[..., Tensor]


def one_step(task: Problem, step: Step, before: Tensor) -> list[Tensor]:
    """The derivative of the outer loss after a step, with where it began held fixed."""
    leaves = [leaf.detach().requires_grad_() for leaf in task.leaves()]
    loss = task.outer(step(before, *leaves), *leaves)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@exact
@pytest.mark.parametrize("name", HEADS)
def test_of_newtons_method_it_is_the_implicit_gradient(name: str) -> None:
    task = problem(name)

    def newton(phi: Tensor, *leaves: Tensor) -> Tensor:
        slope = grad(task.inner)(phi, *leaves)
        return phi - torch.linalg.solve(hessian(task.inner)(phi, *leaves), slope)

    learner, loss = adapt(make_learner(task, inner=Newton(), linear=Identity()), task)
    got = hypergradient(task, loss)
    assert relative_error(got, one_step(task, newton, minimum(name))) < 1e-8
    assert relative_error(got, truth(name)) < 1e-8
    assert learner.diagnostics.cg_reason == FACTORED and learner.diagnostics.unsolved == 0


@exact
@pytest.mark.parametrize("name", [*HEADS, "two layers anchored"])
def test_of_gradient_descent_it_is_the_last_steps_derivative(name: str) -> None:
    """And it says how wrong it is, by the residual: solved or not, the system is as it was."""
    task = problem(name)

    def descent(phi: Tensor, *leaves: Tensor) -> Tensor:
        return phi - task.lr * grad(task.inner)(phi, *leaves)

    for steps in (3, 400):
        parent = make_learner(task, inner=GradientDescent(), linear=Identity(task.lr))
        learner, loss = adapt(parent, task, steps=steps)
        with pytest.warns(UserWarning, match="take CG, or give Nystrom" if steps > 3 else ""):
            got = hypergradient(task, loss)
        said = learner.diagnostics
        assert said.cg_reason == APPROXIMATED and said.unsolved_linear == 1
    expected = one_step(task, descent, flat(learner.module.parameters()))
    assert relative_error(got, expected) < 1e-8 and relative_error(got, truth(name)) > 1e-3
    assert 0.0 < said.cg_residual < 1.0
    assert said.hypergradient_error > 1.0 or name != HEADS[0]
