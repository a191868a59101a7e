"""The inner solvers: gradient descent, and Newton's method where it overshoots or cannot go."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from torch import Tensor, nn

from l2l_implicit import GradientDescent, ImplicitCGHead, Newton
from l2l_implicit.inner_problem.linearization import AutogradLinearization
from l2l_implicit.inner_solvers.newton import NewtonStep

pytestmark = pytest.mark.usefixtures("float64")

Function = Callable[[Tensor], Tensor]


def linearize(function: Function, point: Tensor) -> AutogradLinearization:
    """At a ``point`` of shape ``[1, n]``."""
    phi = point.detach()[0].requires_grad_()
    return AutogradLinearization(function(phi), [phi])


def iterate(
    step: Callable, function: Function, start: Tensor, count: int
) -> tuple[Tensor, list[float]]:
    """The last point, and the objective at each."""
    point, values = start.unsqueeze(0), []
    for _ in range(count):
        at = linearize(function, point)
        values.append(float(at.objective))
        point = step(at)
    return point[0], values


def quadratic(phi: Tensor) -> Tensor:
    a = torch.diag(torch.arange(1.0, 6.0)) + 0.3
    return 0.5 * phi @ a @ phi - phi.sum()


def overshoots(phi: Tensor) -> Tensor:
    """Newton's full step diverges from any start beyond 1.09."""
    return phi.cosh().log().sum()


def saddle(phi: Tensor) -> Tensor:
    return 0.25 * (phi.square() - 1).square().sum()


def newton(**settings) -> NewtonStep:
    return NewtonStep(**{"lr": 0.1, "cg_steps": 50, "tol": 1e-12, **settings})


def test_gradient_step_is_algorithm_1() -> None:
    start = torch.randn(1, 5)
    at = linearize(quadratic, start)
    (slope,) = torch.autograd.grad(quadratic(at.parameters[0]), at.parameters)
    assert torch.equal(GradientDescent().begin(0.1)(at), start - 0.1 * slope)


def test_newton_solves_a_quadratic_in_a_few_steps() -> None:
    a = torch.diag(torch.arange(1.0, 6.0)) + 0.3
    point, _ = iterate(newton(), quadratic, torch.randn(5), 8)
    assert relative_error([point], [torch.linalg.solve(a, torch.ones(5))]) < 1e-12


def test_newton_is_quadratic_near_the_minimum() -> None:
    def smooth(phi: Tensor) -> Tensor:
        return phi.exp().sum() - 2 * phi.sum()

    point, step = torch.zeros(1, 3), newton()
    errors = []
    for _ in range(7):
        point = step(linearize(smooth, point))
        errors.append(float((point - torch.tensor(2.0).log()).norm()))
    assert errors[-1] < 1e-12


def test_full_steps_would_diverge() -> None:
    """The problem deserves its name: undamped, the iterates grow."""
    point = torch.full((3,), 1.5)
    for _ in range(3):
        point = point - torch.tanh(point) * torch.cosh(point) ** 2
    assert point.abs().min() > 10 or not torch.isfinite(point).all()


@pytest.mark.parametrize("start", [1.5, 3.0, 8.0])
def test_newton_backtracks(start: float) -> None:
    point, values = iterate(newton(), overshoots, torch.full((3,), start), 60)
    assert point.abs().max() < 1e-8
    assert any(later > before for before, later in zip(values, values[1:], strict=False))


def test_a_step_to_the_minimum_is_not_rejected_for_rounding() -> None:
    """Where the objective is flat to its last digit, the gradient still tells better from worse."""
    point, step = torch.full((1, 3), 1e-9), newton()
    step._stop._largest = 1.0
    point = step(linearize(overshoots, point))
    assert point.abs().max() < 1e-18
    assert step(linearize(overshoots, point)).abs().max() < 1e-18


def test_newton_backtracks_from_infinity() -> None:
    """A trial point where the objective overflows is taken back too."""

    def barrier(phi: Tensor) -> Tensor:
        return (phi - phi.log()).sum()  # nan for phi < 0; minimum at 1

    step, point = newton(), torch.full((1, 2), 5.0)
    values = []
    for _ in range(40):
        at = linearize(barrier, point)
        values.append(float(at.objective))
        point = step(at)
    assert any(v != v for v in values), "the full step stays in the domain: a weaker test"
    assert torch.allclose(point, torch.ones(1, 2), atol=1e-10)


@pytest.mark.parametrize("start", [0.3, -0.2, 1e-3])
def test_newton_leaves_indefinite_regions(start: float) -> None:
    """Between the minima the Hessian is negative: the gradient is followed, downhill."""
    begin = torch.tensor([start, 0.9, -1.2])
    point, values = iterate(newton(lr=0.5), saddle, begin, 60)
    assert torch.allclose(point, torch.tensor([start, 0.9, -1.2]).sign(), atol=1e-10)
    assert values[-1] < values[0]


def test_negative_curvature_gives_the_gradient_step() -> None:
    start = torch.full((1, 3), 0.1)
    at = linearize(saddle, start)
    assert torch.allclose(newton(lr=0.2)(at), start - 0.2 * at.gradient, rtol=1e-14)


def test_converged_stays_put() -> None:
    point, step = torch.randn(1, 5), newton()
    for _ in range(10):
        point = step(linearize(quadratic, point))
    for _ in range(5):
        after = step(linearize(quadratic, point))
        assert torch.equal(after, point)
        point = after


def test_stationary_start_stays_put() -> None:
    start = torch.zeros(1, 3)
    assert torch.equal(newton()(linearize(lambda p: p.square().sum(), start)), start)


def test_objective_never_rises_over_accepted_points() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(20, 4) * 5, torch.arange(20) % 3
    w1, w2 = torch.randn(4, 3), torch.randn(3, 3)

    def network(phi: Tensor) -> Tensor:
        hidden = torch.tanh(x @ (w1 + phi[:12].view(4, 3)))
        logits = 3 * hidden @ (w2 + phi[12:].view(3, 3))
        return F.cross_entropy(logits, y) + 0.05 * phi.square().sum()

    _, values = iterate(newton(), network, torch.zeros(21), 80)
    assert values[-1] < values[0]
    best = values[0]
    for value in values[1:]:
        best = min(best, value)
    assert values[-1] <= best + 1e-9


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_newton_solves_the_head_where_a_fixed_step_diverges(scale: float) -> None:
    """Features grow in meta-training; Newton's method does not mind, gradient steps do."""
    x, y = scale * torch.randn(25, 10), torch.arange(25) % 5
    norms = {}
    for name, inner in {"newton": Newton(), "gradient": GradientDescent()}.items():
        learner = ImplicitCGHead(nn.Linear(10, 5), 0.1, l2=0.1, inner=inner).clone()
        for _ in range(60 if name == "gradient" else 1):
            learner.adapt(F.cross_entropy(learner(x), y))
        objective = F.cross_entropy(learner(x), y) + 0.05 * sum(
            p.square().sum() for p in learner.parameters()
        )
        slopes = torch.autograd.grad(objective, list(learner.parameters()))
        norms[name] = sum(float(g.square().sum()) for g in slopes) ** 0.5
    assert norms["newton"] < 1e-12 * max(1.0, scale)
    if scale == 30.0:
        assert norms["gradient"] > 1.0
