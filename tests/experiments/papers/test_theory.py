"""K_0, N_0 and L_F against problems on which everything is known by hand."""

import doctest
import inspect
import math

import pytest
import torch
from oracles import subroutine_1
from torch import Tensor

from experiments.papers.convergence import theory
from experiments.papers.convergence.theory import (
    ProblemConstants,
    cg_contraction,
    hypergradient_lipschitz,
    inner_lr,
    least_inner_steps,
    least_linear_steps,
)

pytestmark = pytest.mark.usefixtures("float64")
SIMPLE = {"mu": 1.0, "l_g": 10.0, "l_f": 1.0, "l_f0": 1.0}


def quadratic(kappa: float, size: int = 60) -> Tensor:
    """A matrix with eigenvalues from 1 to kappa where they are worst for conjugate gradient."""
    angles = math.pi * (torch.arange(size) + 0.5) / size
    eigenvalues = 0.5 * (kappa + 1) + 0.5 * (kappa - 1) * torch.cos(angles)
    rotation, _ = torch.linalg.qr(torch.randn(size, size))
    return rotation @ torch.diag(eigenvalues) @ rotation.T


def test_by_hand() -> None:
    constants = ProblemConstants(**SIMPLE)
    # 2 * 0.9**17 = 0.33354 and 2 * 0.9**18 = 0.30019; a third lies between.
    assert least_inner_steps(constants) == 18
    # C_1 = 12, so 6 kappa^2 = 600 is the larger need; 40 * 0.5195**14 * 600 = 2.5 is too much,
    # 40 * 0.5195**16 * 600 = 0.68 is not.
    assert least_linear_steps(constants) == 8
    # (1 + 10) * (1 + 10) * 1, the inner derivatives being constant
    assert hypergradient_lipschitz(constants) == pytest.approx(121.0)
    assert inner_lr(constants) == 0.1
    assert inner_lr(constants, every_task=False) == pytest.approx(1 / 300)
    # 2 * (1 - 1 / 300)**537 is just below a third
    assert least_inner_steps(constants, 1 / 300) == 537


def test_every_constant_is_counted() -> None:
    base, least = ProblemConstants(**SIMPLE), least_linear_steps(ProblemConstants(**SIMPLE))
    assert least_linear_steps(ProblemConstants(**SIMPLE, l_g2=10.0)) > least
    assert least_linear_steps(ProblemConstants(**SIMPLE, sigma_g1=100.0)) > least
    drawn = ProblemConstants(**SIMPLE, l_g2=1.0, sigma_f1=100.0)
    assert least_linear_steps(drawn) > least_linear_steps(ProblemConstants(**SIMPLE, l_g2=1.0))
    # (1 + 10) * [(1 + 10) * 1 + 1 * (2 + 10 * 3)]
    bent = ProblemConstants(**SIMPLE, l_g1=2.0, l_g2=3.0)
    assert hypergradient_lipschitz(bent) == pytest.approx(11 * 43)
    assert least_inner_steps(bent) == least_inner_steps(base)


@pytest.mark.parametrize("kappa", [1.0, 3.0, 30.0, 300.0])
def test_k0_contracts_the_inner_error(kappa: float) -> None:
    """In the direction of the smallest curvature gradient descent is slowest."""
    constants = ProblemConstants(mu=2.0, l_g=2.0 * kappa, l_f=1.0, l_f0=1.0)
    lr, distance = inner_lr(constants), 1.0
    steps = least_inner_steps(constants)
    for _ in range(steps):
        distance -= lr * constants.mu * distance
    assert 2 * distance**2 < 1 / 3
    if steps > 1:  # no smaller K has the property that the proof uses
        assert 2 * (1 - constants.mu * lr) ** (steps - 1) >= 1 / 3


@pytest.mark.parametrize("kappa", [2.0, 20.0, 100.0])
def test_conjugate_gradient_keeps_to_its_bound(kappa: float) -> None:
    a, b = quadratic(kappa), torch.randn(60)
    largest = 0.0
    for steps in range(1, 30):
        if cg_contraction(kappa, steps) < 1e-24:
            break  # rounding
        left = a @ subroutine_1(a.mv, b, steps) - b
        ratio = float(left.square().sum() / b.square().sum())
        assert ratio <= cg_contraction(kappa, steps)
        largest = max(largest, ratio / cg_contraction(kappa, steps))
    assert largest > 1e-3  # a bound, and not one that says nothing


def test_n0_contracts_the_linear_error() -> None:
    a, b = quadratic(20.0), torch.randn(60)
    steps = least_linear_steps(ProblemConstants(mu=1.0, l_g=20.0, l_f=0.1, l_f0=1.0))
    left = a @ subroutine_1(a.mv, b, steps) - b
    assert 2 * 20.0**2 * float(left.square().sum()) < float(b.square().sum()) / 3


def test_conjugate_gradient_ends() -> None:
    hard = ProblemConstants(mu=1.0, l_g=1e4, l_f=1.0, l_f0=1.0)
    assert least_linear_steps(hard, unknowns=5) == 5 < least_linear_steps(hard)
    assert cg_contraction(1e4, 5, unknowns=5) == 0.0 < cg_contraction(1e4, 4, unknowns=5)
    assert least_linear_steps(ProblemConstants(mu=3.0, l_g=3.0, l_f=1.0, l_f0=1.0)) == 1


def test_the_hypergradient_of_a_quadratic_keeps_to_its_bound() -> None:
    """g = phi'A phi/2 - phi'B theta, f = |phi - y|^2/2: F's Hessian is B'A^-2 B."""
    a, b = quadratic(5.0), torch.randn(60, 4)
    b = 5.0 * b / torch.linalg.matrix_norm(b, 2)
    solved = torch.linalg.solve(a, b)
    curvature = float(torch.linalg.eigvalsh(solved.T @ solved).max())
    joint = float(torch.linalg.matrix_norm(torch.cat([a, -b], 1), 2))
    constants = ProblemConstants(mu=1.0, l_g=joint, l_f=1.0, l_f0=0.0)
    assert 0.1 < curvature <= hypergradient_lipschitz(constants)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu": 0.0}, "mu: expected a number above 0"),
        ({"l_g": 0.5}, "l_g: expected at least mu"),
        ({"l_f0": math.inf}, "l_f0: expected a finite number"),
        ({"sigma_f1": -1.0}, "sigma_f1: expected a number of at least 0"),
    ],
)
def test_wrong_constants(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProblemConstants(**{**SIMPLE, **changes})


def test_wrong_arguments() -> None:
    constants = ProblemConstants(**SIMPLE)
    with pytest.raises(ValueError, match="lr: expected at most 1 / l_g = 0.1, got 0.2"):
        least_inner_steps(constants, 0.2)
    with pytest.raises(ValueError, match="unknowns"):
        least_linear_steps(constants, unknowns=0)


def test_everything_public_has_an_example_that_holds() -> None:
    found = doctest.DocTestFinder().find(theory, "theory")
    shown = {test.name.removeprefix("theory.") for test in found if test.examples}
    public = {
        name
        for name, value in vars(theory).items()
        if inspect.getmodule(value) is theory and not name.startswith("_")
    }
    assert len(public) == 6 and public <= shown
    assert doctest.testmod(theory).failed == 0
