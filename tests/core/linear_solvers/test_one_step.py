"""One-step differentiation: the derivative of the last inner step, against dense oracles.

Bolte, Pauwels, Vaiter (2023): of Newton's method it is the implicit gradient in the limit; of
gradient descent it misses the rate at which a step contracts.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import flat, relative_error
from problems import EXACT, Problem, adapt, hypergradient, make_learner, minimum, problem, truth
from torch import Tensor
from torch.func import grad, hessian

from l2l_implicit import GradientDescent, Identity, Newton
from l2l_implicit.linear_solvers.solution import APPROXIMATED, FACTORED

pytestmark = pytest.mark.usefixtures("float64")
HEADS = ["softmax mean bias", "anchored softmax", "ridge mean"]
Step = Callable[..., Tensor]


def newton(task: Problem) -> Step:
    def step(phi: Tensor, *leaves: Tensor) -> Tensor:
        slope = grad(task.inner)(phi, *leaves)
        return phi - torch.linalg.solve(hessian(task.inner)(phi, *leaves), slope)

    return step


def descent(task: Problem) -> Step:
    return lambda phi, *leaves: phi - task.lr * grad(task.inner)(phi, *leaves)


def one_step(task: Problem, step: Step, before: Tensor) -> list[Tensor]:
    """The derivative of the outer loss after a step, with where it began held fixed."""
    leaves = [leaf.detach().requires_grad_() for leaf in task.leaves()]
    gradients = torch.autograd.grad(
        task.outer(step(before, *leaves), *leaves), leaves, allow_unused=True
    )
    pairs = zip(gradients, leaves, strict=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


@pytest.mark.parametrize("name", HEADS)
def test_of_newtons_method_it_is_the_implicit_gradient_in_the_limit(name: str) -> None:
    task, fixed = problem(name), [leaf.detach() for leaf in problem(name).leaves()]
    step, solution, phi = newton(task), minimum(name), task.start().detach()
    rates = []
    for _ in range(8):
        error = relative_error(one_step(task, step, phi), truth(name))
        distance = float((phi - solution).norm() / solution.norm())
        rates.append(error / max(distance, 1e-9))
        phi = step(phi, *fixed)
    assert error < 1e-8 and max(rates) < 50.0, "not of the order of the distance"
    learner, loss = adapt(make_learner(task, inner=Newton(), linear=Identity()), task)
    assert relative_error(hypergradient(task, loss), one_step(task, step, solution)) < 1e-8
    assert learner.diagnostics.cg_reason == FACTORED and learner.diagnostics.unsolved == 0


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("name", [*HEADS, "two layers anchored"])
def test_of_gradient_descent_it_is_the_last_steps_derivative(name: str) -> None:
    """Away from the minimum too: after few steps, and after many."""
    task = problem(name)
    for steps in (3, 400):
        parent = make_learner(task, inner=GradientDescent(), linear=Identity(task.lr))
        learner, loss = adapt(parent, task, steps=steps)
        phi = flat(learner.module.parameters())
        got, expected = hypergradient(task, loss), one_step(task, descent(task), phi)
        if steps > 3:  # else the outer loss's slope is that after one more step
            assert relative_error(got, expected) < 1e-8
            assert relative_error(got, truth(name)) > 1e-3
        assert learner.diagnostics.cg_reason == APPROXIMATED
        assert learner.diagnostics.unsolved_linear == 1


def test_it_says_how_wrong_it_is() -> None:
    """By the residual, of a solved problem whose linear system it leaves as it was."""
    task = problem("softmax mean bias")
    solvers = {**EXACT, "inner": GradientDescent(), "linear": Identity(task.lr)}
    with pytest.warns(UserWarning, match="take CG, or give Nystrom a higher rank"):
        learner, loss = adapt(make_learner(task, **solvers), task, steps=400)
        loss.backward()
    assert 0.0 < learner.diagnostics.cg_residual < 1.0 < learner.diagnostics.hypergradient_error
