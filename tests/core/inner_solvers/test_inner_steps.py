"""The inner solvers: gradient descent, and Newton's method where it overshoots or cannot go."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_implicit import LBFGS, GradientDescent, ImplicitCGHead
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
    """The last point ``[n]``, and the objective at each."""
    point, values = start.unsqueeze(0), []
    for _ in range(count):
        at = linearize(function, point)
        values.append(float(at.objective))
        point = step(at)
    return point[0], values


MATRIX = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)) + 0.3


def quadratic(phi: Tensor) -> Tensor:
    return 0.5 * phi @ MATRIX @ phi - phi.sum()


def overshoots(phi: Tensor) -> Tensor:
    """Newton's full step, ``-sinh(2 phi) / 2``, diverges from any start beyond 1.09."""
    return phi.cosh().log().sum()


def barrier(phi: Tensor) -> Tensor:
    return (phi - phi.log()).sum()  # nan for phi < 0; minimum at 1


def saddle(phi: Tensor) -> Tensor:
    return 0.25 * (phi.square() - 1).square().sum()


def newton(**settings) -> NewtonStep:
    return NewtonStep(**{"lr": 0.1, "cg_steps": 50, "tol": 1e-12, **settings})


def test_gradient_step_is_algorithm_1() -> None:
    start = torch.randn(1, 5)
    at = linearize(quadratic, start)
    (slope,) = torch.autograd.grad(quadratic(at.parameters[0]), at.parameters)
    assert torch.equal(GradientDescent().begin(0.1)(at), start - 0.1 * slope)


SOLVED: list[tuple[Function, Tensor, Tensor, int]] = [  # start, minimum, steps
    (quadratic, torch.full((5,), 2.0), torch.linalg.solve(MATRIX, torch.ones(5).double()), 8),
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
