"""The linear solvers besides conjugate gradient, on systems whose answers are known."""

import math

import pytest
import torch
from oracles import relative_error

from l2l_implicit.linear_solvers.curvature import largest_curvature
from l2l_implicit.linear_solvers.direct_solve import LARGEST, direct_solve
from l2l_implicit.linear_solvers.neumann_series import neumann_series
from l2l_implicit.linear_solvers.solution import (
    DIVERGED,
    MAX_STEPS,
    NON_FINITE,
    NOT_POSITIVE,
    ZERO,
)

pytestmark = pytest.mark.usefixtures("float64")


def test_neumann_is_its_series_and_says_how_far_it_got() -> None:
    a, b = torch.diag(torch.linspace(1.0, 4.0, 6)), torch.randn(6)
    answer = neumann_series(a.mv, b, max_steps=5, alpha=0.2, tol=1e-12)
    series = sum(torch.linalg.matrix_power(torch.eye(6) - 0.2 * a, j) @ b for j in range(5))
    assert relative_error([answer.solution], [0.2 * series]) < 1e-14
    residual = float((b - a @ answer.solution).norm() / b.norm())
    assert answer.relative_residual == pytest.approx(residual, rel=1e-12)
    assert (answer.steps, answer.reason) == (5, MAX_STEPS)
    assert neumann_series(a.mv, b, max_steps=5, alpha=0.9).reason == DIVERGED
    assert neumann_series((-a).mv, b).reason == DIVERGED
    assert neumann_series(a.mv, torch.zeros(6)).reason == ZERO
    assert neumann_series(a.mv, torch.full((6,), math.nan)).reason == NON_FINITE
    start = torch.linalg.solve(a, b)
    assert neumann_series(a.mv, b, start=start).steps == 0


def test_direct_solve_of_every_kind_of_matrix() -> None:
    b = torch.randn(4)
    indefinite = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1.0]))
    answer = direct_solve(indefinite.mv, b)
    assert relative_error([answer.solution], [torch.linalg.solve(indefinite, b)]) < 1e-14
    assert answer.reason == NOT_POSITIVE and answer.relative_residual < 1e-15
    singular = direct_solve(torch.zeros_like, b)
    assert singular.reason == NOT_POSITIVE and singular.relative_residual == 1.0
    assert direct_solve(indefinite.mv, torch.zeros(4)).reason == ZERO
    assert direct_solve(lambda v: v * math.nan, b).reason == NON_FINITE
    with pytest.raises(ValueError, match="solver='direct': expected at most .* use solver='cg'"):
        direct_solve(lambda v: v, torch.ones(LARGEST + 1))


def test_largest_curvature_counts_both_signs() -> None:
    q = torch.linalg.qr(torch.randn(30, 30))[0]
    a = q @ torch.diag(torch.linspace(-9.0, 5.0, 30)) @ q.t()
    assert largest_curvature(a.mv, torch.ones(30), max_steps=30) == pytest.approx(9.0, rel=0.02)
    assert largest_curvature(torch.zeros_like, torch.ones(3)) == 0.0
