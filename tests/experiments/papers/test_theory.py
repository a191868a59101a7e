"""K_0, N_0 and L_F against problems on which everything is known by hand."""

import doctest
import inspect
import math
from collections.abc import Callable

import pytest
import torch
from oracles import subroutine_1
from torch import Tensor

from experiments.papers.convergence import theory
from experiments.papers.convergence.theory import ProblemConstants, cg_contraction

pytestmark = pytest.mark.usefixtures("float64")


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
        return float((a @ subroutine_1(a.mv, b, steps) - b).square().sum() / b.square().sum())

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
