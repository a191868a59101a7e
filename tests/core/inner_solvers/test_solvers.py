"""The inner solvers' own steps; and however both problems are solved, the hypergradient is one."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, relative_error
from problems import adapt, hypergradient, make_learner, problem, truth
from small_task import Y, network, x
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GradientDescent,
    ImplicitCGHead,
    InnerSolver,
    LinearSolver,
    Neumann,
    Newton,
    Nystrom,
)
from l2l_implicit.inner_problem.linearization import AutogradLinearization
from l2l_implicit.inner_solvers.newton import NewtonStep
from l2l_implicit.linear_solvers.solution import CONVERGED, FACTORED

pytestmark = pytest.mark.usefixtures("float64")
Function = Callable[[Tensor], Tensor]


def linearize(function: Function, point: Tensor) -> AutogradLinearization:
    """At a ``point`` of shape ``[1, n]``."""
    phi = point.detach()[0].requires_grad_()
    return AutogradLinearization(function(phi), [phi])


def iterate(
    step: Callable, function: Function, start: Tensor, count: int
) -> tuple[Tensor, list[float]]:
    """The last point ``[n]``, and the objective at each."""
    point, values = start.unsqueeze(0), []
    for _ in range(count):
        at = linearize(function, point)
        values.append(float(at.objective))
        point = step(at)
    return point[0], values


MATRIX = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)) + 0.3


def overshoots(phi: Tensor) -> Tensor:
    """Newton's full step, ``-sinh(2 phi) / 2``, diverges from any start beyond 1.09."""
    return phi.cosh().log().sum()


def barrier(phi: Tensor) -> Tensor:
    return (phi - phi.log()).sum()  # nan for phi < 0; minimum at 1


def saddle(phi: Tensor) -> Tensor:
    return 0.25 * (phi.square() - 1).square().sum()


def newton(**settings) -> NewtonStep:
    return NewtonStep(**{"lr": 0.1, "cg_steps": 50, "tol": 1e-12, **settings})


SOLVED: list[tuple[Function, Tensor, Tensor, int]] = [  # start, minimum, steps
    (lambda p: 0.5 * p @ MATRIX @ p - p.sum(), torch.full((5,), 2.0),
     torch.linalg.solve(MATRIX, torch.ones(5).double()), 8),
    (lambda p: p.exp().sum() - 2 * p.sum(), torch.zeros(3), torch.tensor(2.0).log().expand(3), 7),
    *((overshoots, torch.full((3,), start), torch.zeros(3), 60) for start in (1.5, 3.0, 8.0)),
    (lambda p: p.square().sum(), torch.zeros(3), torch.zeros(3), 3),  # stays put
    (barrier, torch.full((2,), 5.0), torch.ones(2), 40),
    *((saddle, torch.tensor([s, 0.9, -1.2]), torch.tensor([s, 0.9, -1.2]).sign(), 60)
      for s in (0.3, -0.2, 1e-3)),
]  # fmt: skip


@pytest.mark.parametrize("function, start, minimum, steps", SOLVED)
def test_newton_finds_the_minimum_and_stays(
    function: Function, start: Tensor, minimum: Tensor, steps: int
) -> None:
    """It backtracks, also from infinity, and leaves indefinite regions downhill."""
    step = newton(lr=0.5)
    point, values = iterate(step, function, start.double(), steps)
    assert torch.allclose(point, minimum.double(), rtol=1e-8, atol=1e-8)
    assert not values[-1] > values[0]
    after, _ = iterate(step, function, point, 3)
    assert torch.equal(iterate(step, function, after, 5)[0], after)
    if function is overshoots:
        assert any(later > before for before, later in zip(values, values[1:], strict=False))
    if function is barrier:
        assert any(v != v for v in values), "the full step stays in the domain: a weaker test"


def test_a_step_to_the_minimum_is_not_rejected_for_rounding() -> None:
    """Where the objective is flat to its last digit, the gradient still tells better from worse."""
    point, step = torch.full((1, 3), 1e-9), newton()
    step._stop._largest = 1.0
    for _ in range(2):
        point = step(linearize(overshoots, point))
        assert point.abs().max() < 1e-18


def test_negative_curvature_gives_the_gradient_step() -> None:
    start = torch.full((1, 3), 0.1)
    at = linearize(saddle, start)
    assert torch.allclose(newton(lr=0.2)(at), start - 0.2 * at.gradient, rtol=1e-14)


def test_lbfgs_searches_the_line_where_its_first_trial_is_too_long() -> None:
    """Next to the minimum, with no regulariser to say how long a step may be."""
    x, module = 30 * torch.randn(6, 4), nn.Linear(4, 3)
    for parameter in module.parameters():
        parameter.data.mul_(1e-3)
    learner = ImplicitCGHead(module, 0.1, l2=0.0, inner=LBFGS()).clone()

    def loss() -> Tensor:
        return F.mse_loss(learner(x), torch.zeros(6, 3), reduction="sum")

    before = float(loss().detach())
    learner.adapt(loss())
    assert float(loss().detach()) < 0.9 * before


class Own:
    """An inner solver with the protocol's one method: Newton's steps, without its closed form."""

    def begin(self, lr: float) -> NewtonStep:
        return NewtonStep(lr, 100, 1e-13)


# Inner solvers, and the steps after which each has converged.
INNER: dict[str, tuple[InnerSolver, int]] = {
    "newton": (Newton(cg_steps=200, tol=1e-13), 30),
    "gradient": (GradientDescent(), 250),
    "gradient, adaptive": (GradientDescent(adaptive=True), 500),
    "lbfgs": (LBFGS(tol=1e-13), 100),
    "one's own": (Own(), 30),
}
LINEAR: list[LinearSolver] = [
    CG(3000, 1e-13), CG(3000, 1e-13, preconditioner=Nystrom(5)), Neumann(3000, 1e-13), Direct()
]  # fmt: skip
HEADS = ["softmax mean bias", "ridge mean", "two layers anchored"]


@pytest.mark.parametrize("linear", LINEAR, ids=repr)
@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("name", HEADS)
def test_all_meet_at_one_hypergradient(name: str, inner: str, linear: LinearSolver) -> None:
    task = problem(name)
    solver, steps = INNER[inner]
    learner, loss = adapt(make_learner(task, inner=solver, linear=linear), task, "closure", steps)
    assert relative_error(hypergradient(task, loss), truth(name)) < 1e-8
    found = learner.diagnostics
    factored = inner == "newton" and not isinstance(linear, Neumann) and "layers" not in name
    assert found.cg_reason == (FACTORED if factored else CONVERGED)
    assert found.unsolved == 0


def test_auto_lr_is_one_over_the_largest_curvature() -> None:
    a = torch.diag(torch.linspace(0.1, 7.0, 60))
    at = linearize(lambda phi: 0.5 * phi @ a @ phi, torch.randn(1, 60))
    step = GradientDescent(adaptive=True).begin(0.3)
    moved = step(at)
    assert 1 / step.lr == pytest.approx(7.0, rel=0.1) and 1 / step.lr > 0.97 * 7.0
    assert torch.equal(moved, at.point - step.lr * at.gradient)


def test_auto_lr_is_shortened_where_the_objective_rises() -> None:
    """A curvature that grows with the distance."""
    step, lrs, point = GradientDescent(adaptive=True).begin(0.3), [], torch.tensor([[0.1, 0.1]])
    for _ in range(60):
        point = step(linearize(lambda p: (p - 3).pow(4).sum() + p.square().sum(), point))
        lrs.append(step.lr)
    assert all(later <= before for before, later in zip(lrs, lrs[1:], strict=False))
    assert float(point.max() - point.min()) < 1e-6 and torch.isfinite(point).all()


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("method", [GradientDescent, Newton, LBFGS])
def test_a_solvers_tol(method: type) -> None:
    inputs = x()
    for tol in (1e-1, 1e-3):
        learner = ImplicitCGHead(network(), 0.5, anchor="init", inner=method(tol=tol)).clone()
        loss = F.cross_entropy(learner(inputs), Y)
        first = torch.autograd.grad(loss, list(learner.parameters()))
        start = [p.detach().clone() for p in learner.parameters()]
        learner.adapt(lambda: F.cross_entropy(learner(inputs), Y), steps=400)  # noqa: B023
        F.cross_entropy(learner(inputs), Y).backward()
        moved = [0.1 * (p - a) for p, a in zip(learner.parameters(), start, strict=True)]
        scale = max(float(flat(g).norm()) for g in (first, moved))
        assert learner.diagnostics.inner_gradient_norm <= tol * scale
        assert learner.diagnostics.inner_steps < 400


def test_lbfgs_needs_a_loss_that_it_can_compute_again() -> None:
    learner = ImplicitCGHead(network(), 0.1, inner=LBFGS()).clone()
    with pytest.raises(RuntimeError, match=r"expected a loss .* use adapt\(closure, steps=K\)"):
        learner.adapt(F.cross_entropy(learner(x()), Y))


FROZEN = [m for m in (*LINEAR, *(solver for solver, _ in INNER.values())) if not isinstance(m, Own)]


@pytest.mark.parametrize("method", FROZEN, ids=repr)
def test_methods_are_frozen_and_say_what_they_are(method: object) -> None:
    assert eval(repr(method)) == method and hash(method) == hash(eval(repr(method)))
    with pytest.raises(FrozenInstanceError):
        method.damping = 1.0
