"""The hypergradient against oracles that share no code with it."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from oracles import finite_difference, flat, implicit, relative_error, unrolled
from problems import EXACT, NAMES, Problem, adapt, hypergradient, make_learner, problem, truth
from small_task import HOWS
from torch import Tensor, nn
from torch.func import grad, hessian

from l2l_implicit import CG, Direct, GaussNewton, GradientDescent, Identity, Neumann, Newton
from l2l_implicit.linear_solvers.solution import APPROXIMATED, FACTORED

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("error:.*second derivative:l2l_implicit.UnsolvedWarning"),
]

# The slowest problem ends 3e-12 away after 300 gradient steps, unrolled 3e-10.
INNER = {"newton": (EXACT["inner"], 30), "gradient": (GradientDescent(), 300)}


@pytest.mark.parametrize("name", NAMES)
def test_implicit_unrolled_and_finite_differences_meet(name: str) -> None:
    task = problem(name)
    leaves = task.leaves()
    _, loss = adapt(make_learner(task), task)
    got = hypergradient(task, loss)
    assert relative_error(got, truth(name)) < 1e-9
    long_way = unrolled(task.inner, task.outer, leaves, task.start(), task.lr, INNER["gradient"][1])
    assert relative_error(got, long_way) < 1e-6
    direction = [torch.randn_like(t) for t in leaves]
    slope = finite_difference(task.inner, task.outer, leaves, direction, problems.minimum(name))
    along = sum(float((g * d).sum()) for g, d in zip(got, direction, strict=True))
    scale = sum(float(g.square().sum()) for g in got) ** 0.5
    assert abs(slope - along) < 1e-6 * max(abs(slope), scale)


@HOWS
@pytest.mark.parametrize("name, inner, cached, settings", [
    *((name, inner, True, {}) for name in NAMES for inner in INNER),
    *((name, "newton", False, {})  # features recomputed at every step
      for name in ("softmax mean bias", "two layers", "leaf direct and upstream")),
    *((name, "newton", True, {"curvature": GaussNewton()})  # of a linear head the Hessian
      for name in ("scaled logits", "leaf direct and upstream", "module beside", "binary logits",
                   "parent in the loss anchored")),
])  # fmt: skip
def test_every_way_of_adapting(
    name: str, inner: str, cached: bool, settings: dict[str, Any], how: str
) -> None:
    task, (solver, steps) = problem(name), INNER[inner]
    learner = make_learner(task, inner=solver, **settings)
    _, loss = adapt(learner, task, how, steps, cached)
    assert relative_error(hypergradient(task, loss), truth(name)) < 1e-8


def test_gradient_steps_converge_at_the_rate_of_gradient_descent() -> None:
    """Error <= C (1 - lr mu)^K, with mu the smallest curvature, lr below 1 / the largest."""
    task = problem("softmax mean", lr=0.8)
    exact, parent = problems.expected(task), make_learner(task, inner=GradientDescent())
    errors = []
    for steps in (20, 30, 40, 50):
        _, loss = adapt(parent, task, "closure", steps)
        errors.append(relative_error(hypergradient(task, loss), exact))
    rate = (1 - task.lr * task.l2) ** 10
    assert 1e-12 < errors[-1]
    assert all(after < 1.2 * rate * before for before, after in itertools.pairwise(errors))


@HOWS
@pytest.mark.parametrize("name", ["softmax mean bias", "ridge sum", "anchored softmax"])
def test_a_linear_head_is_solved_at_the_first_adapt(name: str, how: str) -> None:
    """Whatever the steps and the tolerances; the backward pass uses the factor."""
    task = problem(name)
    parent = make_learner(task, inner=Newton(cg_steps=1, tol=0.5), linear=CG(steps=1, tol=0.5))
    learner, loss = adapt(parent, task, how, 1)
    assert relative_error(hypergradient(task, loss), truth(name)) < 1e-10
    found = learner.diagnostics
    assert (found.cg_reason, found.cg_steps, found.unsolved) == (FACTORED, 0, 0)
    before = list(learner.module.parameters())
    again = adapt(parent, task, how, 7)[0]
    assert relative_error(list(again.parameters()), before) < 1e-14


def test_a_loss_is_linearized_where_it_was_computed() -> None:
    """One adapt(loss) must use the curvature at phi^0 and b at phi^1, and nothing else."""
    task = problem("softmax mean bias")
    fixed, start = [t.detach() for t in task.leaves()], task.start()
    slope = torch.func.grad(task.inner)
    moved = start - task.lr * slope(start, *fixed)
    h = torch.func.hessian(task.inner)(start, *fixed)
    v = torch.linalg.solve(h, torch.func.grad(task.outer)(moved, *fixed))
    mixed = torch.func.jacrev(slope, argnums=1)(start, *fixed)
    direct = torch.func.grad(task.outer, argnums=1)(moved, *fixed)
    _, loss = adapt(make_learner(task, inner=GradientDescent()), task, "loss", 1)
    got = hypergradient(task, loss)[0]
    assert relative_error([got], [direct - torch.tensordot(v, mixed, dims=1)]) < 1e-11


# Heads of other kinds.


class WrittenOut(nn.Module):
    """A normalisation by its formula: torch.func's second derivatives of torch's are off by 1 %."""

    def __init__(self, norm: nn.BatchNorm1d | nn.LayerNorm) -> None:
        super().__init__()
        self.dim, self.eps = 0 if isinstance(norm, nn.BatchNorm1d) else 1, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        centered = x - x.mean(self.dim, keepdim=True)
        variance = centered.square().mean(self.dim, keepdim=True)
        return centered / (variance + self.eps).sqrt() * self.weight + self.bias


def tabular(*between: nn.Module) -> Problem:
    """Given columns; of the features only their scales are learned."""
    head = nn.Sequential(nn.Linear(4, 6), *between, nn.Tanh(), nn.Linear(6, 3)).double()

    def embed(theta: problems.Theta) -> tuple[Tensor, Tensor]:
        support, query = problems.raw(theta)
        return support * theta["factors"], query * theta["factors"]

    factors = (1 + 0.1 * torch.randn(4)).requires_grad_()
    return Problem("tabular", head, {"factors": factors}, embed, problems.cross_entropy("mean"),
                   problems.query_cross_entropy, anchor="init", l2=1.0, lr=0.1)  # fmt: skip


CASES: dict[str, Callable[[], Problem]] = {
    "layer norm": lambda: tabular(nn.LayerNorm(6)),
    "batch norm": lambda: tabular(nn.BatchNorm1d(6)),
    "batch norm in eval mode": lambda: tabular(nn.BatchNorm1d(6).eval()),
    "convolution": lambda: tabular(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3, padding=1), nn.AvgPool1d(2), nn.Flatten()),
}  # fmt: skip


@HOWS
@pytest.mark.parametrize("name", CASES)
def test_of_other_kinds(name: str, how: str) -> None:
    task = CASES[name]()
    parent = make_learner(task)
    learner, loss = adapt(parent, task, how)
    got = [g.clone() for g in hypergradient(task, loss)]
    oracle = copy.deepcopy(task.head)
    for child, module in oracle.named_children():
        if module.training and isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            setattr(oracle, child, WrittenOut(module))
    task.head = oracle
    assert problems.error_where_it_ended(task, learner, got) < 1e-8
    assert parent.diagnostics.unsolved == 0


# Damped systems.


@pytest.mark.parametrize("name", NAMES)
def test_the_damped_system_is_solved(name: str) -> None:
    task = problem(name)
    _, loss = adapt(make_learner(task, linear=replace(EXACT["linear"], damping=0.7)), task)
    got = hypergradient(task, loss)
    assert relative_error(got, truth(name, 0.7)) < 1e-9
    assert relative_error(got, truth(name)) > 1e-3


@pytest.mark.parametrize(
    "linear", [CG(3000, 1e-13, 2.0), Neumann(3000, 1e-13, damping=2.0), Direct(2.0)]
)
def test_where_the_matrix_is_indefinite(linear: Any) -> None:
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


# One step. Bolte, Pauwels, Vaiter (2023): the derivative of the last step of Newton's method is the
# implicit gradient in the limit; that of gradient descent misses the rate at which it contracts.


HEADS = ["softmax mean bias", "anchored softmax", "ridge mean"]


def one_step(task: Problem, step: Callable[..., Tensor], before: Tensor) -> list[Tensor]:
    """The derivative of the outer loss after a step, with where it began held fixed."""
    leaves = [leaf.detach().requires_grad_() for leaf in task.leaves()]
    loss = task.outer(step(before, *leaves), *leaves)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", HEADS)
def test_of_newtons_method_it_is_the_implicit_gradient(name: str) -> None:
    task = problem(name)

    def newton(phi: Tensor, *leaves: Tensor) -> Tensor:
        slope = grad(task.inner)(phi, *leaves)
        return phi - torch.linalg.solve(hessian(task.inner)(phi, *leaves), slope)

    learner, loss = adapt(make_learner(task, inner=Newton(), linear=Identity()), task)
    got = hypergradient(task, loss)
    assert relative_error(got, one_step(task, newton, problems.minimum(name))) < 1e-8
    assert relative_error(got, truth(name)) < 1e-8
    assert learner.diagnostics.cg_reason == FACTORED and learner.diagnostics.unsolved == 0


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
