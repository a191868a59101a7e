"""The convergence experiment: its problem, Algorithm 1, slopes and constants on small ones."""

import doctest
import inspect
import math
from collections.abc import Callable

import numpy as np
import oracles
import pytest
import torch
from torch import Tensor

from experiments.papers.convergence import __main__ as parts
from experiments.papers.convergence import problem, theory
from experiments.papers.convergence.problem import Algorithm1, Settings, Tasks, trajectory
from experiments.papers.convergence.theory import ProblemConstants, cg_contraction

pytestmark = pytest.mark.usefixtures("float64")
P, Q = 3, 6
THETA = torch.tensor([0.3, -0.8, 0.5], dtype=torch.float64)


def small(seed: int = 0) -> Tasks:
    return problem.make_tasks(4, P, Q, 5.0, 0.5, 3.0, 1.0, seed)


def settings(tasks: Tasks, **changes: float) -> Settings:
    constants = tasks.constants()
    steps = theory.least_inner_steps(constants), theory.least_linear_steps(constants, Q)
    return Settings(*steps, theory.inner_lr(constants), 0.8)._replace(**changes)


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


# K_0, N_0 and L_F against problems on which everything is known by hand.


def simple(**changes: float) -> ProblemConstants:
    return ProblemConstants(**{"mu": 1.0, "l_g": 10.0, "l_f": 1.0, "l_f0": 1.0, **changes})


def quadratic(kappa: float, size: int = 60) -> Tensor:
    """A matrix with eigenvalues from 1 to kappa where they are worst for conjugate gradient."""
    angles = math.pi * (torch.arange(size) + 0.5) / size
    eigenvalues = 0.5 * (kappa + 1) + 0.5 * (kappa - 1) * torch.cos(angles)
    rotation, _ = torch.linalg.qr(torch.randn(size, size))
    return rotation @ torch.diag(eigenvalues) @ rotation.T


def test_the_examples_are_by_hand_and_everything_public_has_one() -> None:
    """K_0: 2 * 0.9**17 = 0.33354, 2 * 0.9**18 = 0.30019. N_0: C_1 = 12, so 6 kappa^2 = 600 is the
    larger need; 40 * 0.5195**14 * 600 = 2.5, 40 * 0.5195**16 * 600 = 0.68. L_F: 11 * 11."""
    found = doctest.DocTestFinder().find(theory, "theory")
    shown = {test.name.removeprefix("theory.") for test in found if test.examples}
    public = {name for name, value in vars(theory).items()
              if inspect.getmodule(value) is theory and not name.startswith("_")}  # fmt: skip
    assert len(public) == 6 and public <= shown
    assert doctest.testmod(theory).failed == 0
    # 2 * (1 - 1 / 300)**537 is just below a third
    assert theory.least_inner_steps(simple(), 1 / 300) == 537


def test_every_constant_is_counted() -> None:
    least, bent = theory.least_linear_steps(simple()), simple(l_g1=2.0, l_g2=3.0)
    assert theory.least_linear_steps(simple(l_g2=10.0)) > least
    assert theory.least_linear_steps(simple(sigma_g1=100.0)) > least
    drawn = simple(l_g2=1.0, sigma_f1=100.0)
    assert theory.least_linear_steps(drawn) > theory.least_linear_steps(simple(l_g2=1.0))
    # (1 + 10) * [(1 + 10) * 1 + 1 * (2 + 10 * 3)]
    assert theory.hypergradient_lipschitz(bent) == pytest.approx(11 * 43)
    assert theory.least_inner_steps(bent) == theory.least_inner_steps(simple())


@pytest.mark.parametrize("kappa", [1.0, 3.0, 30.0, 300.0])
def test_k0_contracts_the_inner_error(kappa: float) -> None:
    """In the direction of the smallest curvature gradient descent is slowest."""
    constants = simple(mu=2.0, l_g=2.0 * kappa)
    rate, steps = 1 - theory.inner_lr(constants) * constants.mu, theory.least_inner_steps(constants)
    # no smaller K has the property that the proof uses
    assert 2 * rate**steps < 1 / 3 and (steps == 1 or 2 * rate ** (steps - 1) >= 1 / 3)


@pytest.mark.parametrize("kappa", [2.0, 20.0, 100.0])
def test_conjugate_gradient_keeps_to_its_bound(kappa: float) -> None:
    """A bound, and not one that says nothing; with N_0 steps the linear error contracts."""
    a, b = quadratic(kappa), torch.randn(60)

    def left(steps: int) -> float:
        residual = a @ oracles.subroutine_1(a.mv, b, steps) - b
        return float(residual.square().sum() / b.square().sum())

    steps = [n for n in range(1, 30) if cg_contraction(kappa, n) >= 1e-24]  # below: rounding
    ratios = [left(n) / cg_contraction(kappa, n) for n in steps]
    assert 1e-3 < max(ratios) <= 1
    n_0 = theory.least_linear_steps(simple(l_g=kappa, l_f=0.1))
    assert 2 * kappa**2 * left(n_0) < 1 / 3


def test_conjugate_gradient_ends() -> None:
    hard = simple(l_g=1e4)
    assert theory.least_linear_steps(hard, unknowns=5) == 5 < theory.least_linear_steps(hard)
    assert cg_contraction(1e4, 5, unknowns=5) == 0.0 < cg_contraction(1e4, 4, unknowns=5)
    assert theory.least_linear_steps(simple(mu=3.0, l_g=3.0)) == 1


def test_the_hypergradient_of_a_quadratic_keeps_to_its_bound() -> None:
    """g = phi'A phi/2 - phi'B theta, f = |phi - y|^2/2: F's Hessian is B'A^-2 B."""
    a, b = quadratic(5.0), torch.randn(60, 4)
    b = 5.0 * b / torch.linalg.matrix_norm(b, 2)
    solved = torch.linalg.solve(a, b)
    curvature = float(torch.linalg.eigvalsh(solved.T @ solved).max())
    joint = float(torch.linalg.matrix_norm(torch.cat([a, -b], 1), 2))
    assert 0.1 < curvature <= theory.hypergradient_lipschitz(simple(l_g=joint, l_f0=0.0))


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda: simple(mu=0.0), "mu: expected a number above 0"),
    (lambda: simple(l_g=0.5), "l_g: expected at least mu"),
    (lambda: simple(l_f0=math.inf), "l_f0: expected a finite number"),
    (lambda: simple(sigma_f1=-1.0), "sigma_f1: expected a number of at least 0"),
    (lambda: theory.least_inner_steps(simple(), 0.2), "lr: .* at most 1 / l_g = 0.1, got 0.2"),
    (lambda: theory.least_linear_steps(simple(), unknowns=0), "unknowns"),
])  # fmt: skip
def test_wrong_arguments(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
