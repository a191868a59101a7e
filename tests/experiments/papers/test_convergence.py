"""The problem of the convergence experiment, its Algorithm 1, and the slopes on a small one."""

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from experiments.papers.convergence import __main__ as parts
from experiments.papers.convergence.problem import (
    Algorithm1,
    Settings,
    Tasks,
    make_tasks,
    trajectory,
)
from experiments.papers.convergence.theory import inner_lr, least_inner_steps, least_linear_steps

P, Q = 3, 6
THETA = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)


def small(seed: int = 0) -> Tasks:
    return make_tasks(4, P, Q, 5.0, 0.5, 3.0, 1.0, seed)


def settings(tasks: Tasks, **changes: float) -> Settings:
    constants = tasks.constants()
    steps = least_inner_steps(constants), least_linear_steps(constants, Q)
    return Settings(*steps, inner_lr(constants), 0.8)._replace(**changes)


def test_the_exact_hypergradient() -> None:
    """All tasks as one problem of the oracle's."""
    tasks = small()

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        return tasks.inner(phi.view(-1, Q), tasks.pull(theta))

    def outer(phi: Tensor, theta: Tensor) -> Tensor:
        return tasks.outer(phi.view(-1, Q))

    phi = oracles.minimize(inner, torch.zeros(4 * Q, dtype=torch.float64), [THETA], 0.1)
    expected = oracles.implicit(inner, outer, [THETA], phi)
    assert expected[0].norm() > 1e-2
    assert oracles.relative_error([tasks.exact(THETA)], expected) < 1e-10


def test_the_constants_hold() -> None:
    tasks = small()
    c = tasks.constants()
    for scale in (0.1, 1.0, 10.0):
        phi = scale * torch.randn(4, Q, dtype=torch.float64)
        curvatures = torch.linalg.eigvalsh(tasks.curvature(phi))
        assert c.mu - 1e-12 <= curvatures.min() and curvatures.max() <= c.l_g
        slope_ = torch.autograd.functional.jacobian(lambda x: 4 * tasks.outer(x), phi)
        assert slope_.norm(dim=1).max() <= c.l_f0
        near = phi + 1e-4 * torch.randn(4, Q, dtype=torch.float64)
        change = torch.linalg.matrix_norm(tasks.curvature(near) - tasks.curvature(phi), 2)
        assert (change <= c.l_g2 * (near - phi).norm(dim=1) + 1e-15).all()


def test_algorithm_1_reaches_the_exact_hypergradient() -> None:
    tasks = small()
    algorithm = Algorithm1(4, Q, settings(tasks, inner_steps=300, warm=False), THETA)
    exact = tasks.exact(THETA)
    assert oracles.relative_error([algorithm.hypergradient(tasks)], [exact]) < 1e-10


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_slots_do_not_mix() -> None:
    """With too few steps too, a batch is the mean of its tasks, each with its own step lengths."""
    tasks = small()
    few = settings(tasks, inner_steps=3, cg_steps=2, warm=False)
    alone = [
        Algorithm1(1, Q, few, THETA).hypergradient(tasks.subset(torch.tensor([i])))
        for i in range(4)
    ]
    together = Algorithm1(4, Q, few, THETA).hypergradient(tasks)
    assert oracles.relative_error([together], [torch.stack(alone).mean(0)]) < 1e-12
    exact = tasks.exact(THETA)
    assert oracles.relative_error([together], [exact]) > 1e-2


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_two_steps_of_conjugate_gradient_are_subroutine_1() -> None:
    task = small().subset(torch.tensor([2]))
    few = settings(task, inner_steps=4, cg_steps=2, warm=False)
    theta = THETA.clone().requires_grad_()
    phi = torch.zeros(1, Q, dtype=torch.float64)
    for _ in range(4):
        gradient = torch.func.grad(task.inner)(phi, task.pull(theta.detach()))
        phi = phi - few.inner_lr * gradient
    b = torch.func.grad(task.outer)(phi)[0]
    v = oracles.subroutine_1(task.curvature(phi)[0].mv, b, 2)
    # The mixed product: -d/dtheta of the inner gradient along v, which is -v'pull(theta).
    (expected,) = torch.autograd.grad((v * task.pull(theta)[0]).sum(), theta)
    found = Algorithm1(1, Q, few, THETA).hypergradient(task)
    assert oracles.relative_error([found], [expected]) < 1e-12


def test_a_warm_start_goes_on_and_a_cold_one_does_not() -> None:
    tasks, errors = small(), {}
    exact = tasks.exact(THETA)
    for warm in (True, False):
        algorithm = Algorithm1(4, Q, settings(tasks, inner_steps=2, warm=warm), THETA)
        for _ in range(60):
            found = algorithm.hypergradient(tasks)
        errors[warm] = oracles.relative_error([found], [exact])
    assert errors[True] < 1e-8 and errors[False] > 1e-2


def test_theorem_2_on_a_small_problem() -> None:
    tasks = small()
    norms = trajectory(tasks, settings(tasks), 300, None, 0, lambda n: None)
    assert norms[-1] < 1e-12 * norms[0]
    assert parts.last_decade(parts.averages(norms)) == pytest.approx(-1.0, abs=0.02)


def test_theorem_1_on_a_small_problem() -> None:
    tasks, sizes = small(), [1, 8, 64]
    made = settings(tasks)
    floors = [parts.floor(trajectory(tasks, made, 160, b, 1, lambda n: None)) for b in sizes]
    # Eighty correlated draws at each of three sizes leave about 0.2 of uncertainty.
    assert parts.slope(sizes, floors) == pytest.approx(-1.0, abs=0.3)


def test_slopes_and_counts() -> None:
    assert parts.slope([1, 10, 100], [5.0, 0.5, 0.05]) == pytest.approx(-1.0)
    curve = [1 / t for t in range(1, 101)]
    assert parts.last_decade(curve) == pytest.approx(-1.0)
    assert parts.averages([4.0, 2.0, 0.0]) == [4.0, 3.0, 2.0]
    made = Settings(inner_steps=7, cg_steps=5, inner_lr=0.1, meta_lr=1.0)
    # The small batch is cheaper as long as it gets there.
    costs = parts.cheapest({1: [1.0, 0.5, 0.5], 8: [1.0, 0.4, 0.2]}, made, 0.5, 0.1)
    epsilons = list(np.geomspace(0.5, 0.1, 10))
    found = [(round(e, 6), number) for e, number in costs.items()]
    # 0.5 by the small batch; down to 0.4 two, and down to 0.2 three steps of the large one.
    expected = [30, 240, 360, 360, 360, 360]
    assert found == [(round(e, 6), n) for e, n in zip(epsilons, expected, strict=False)]
