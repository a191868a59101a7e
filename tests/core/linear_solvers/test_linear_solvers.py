"""The linear solvers besides conjugate gradient, on systems whose answers are known.

Each solver takes its T systems at once and must give each what it would alone.
"""

import math
from collections.abc import Callable

import pytest
import torch
from oracles import relative_error
from torch import Tensor

from l2l_implicit import CG, Direct, LinearSolution, LinearSolver, Neumann
from l2l_implicit.linear_solvers.curvature import largest_curvature
from l2l_implicit.linear_solvers.direct import LARGEST
from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    DIVERGED,
    MAX_STEPS,
    NON_FINITE,
    NOT_POSITIVE,
    ZERO,
)

pytestmark = pytest.mark.usefixtures("float64")


def rows(a: Tensor) -> Callable[[Tensor], Tensor]:
    """Products of rows with a symmetric matrix."""
    return lambda p: p @ a


def one(b: Tensor) -> Tensor:
    return b.unsqueeze(0)


def ends(answer: LinearSolution) -> tuple[int, str]:
    """Steps and reason of the only task."""
    assert len(answer.steps) == len(answer.reason) == 1
    return int(answer.steps), answer.reason[0]


def test_neumann_is_its_series_and_says_how_far_it_got() -> None:
    a, b = torch.diag(torch.linspace(1.0, 4.0, 6)), torch.randn(6)
    answer = Neumann(5, 1e-12, step_size=0.2).solve(rows(a), one(b))
    series = sum(torch.linalg.matrix_power(torch.eye(6) - 0.2 * a, j) @ b for j in range(5))
    assert relative_error([answer.solution[0]], [0.2 * series]) < 1e-14
    residual = float((b - a @ answer.solution[0]).norm() / b.norm())
    assert float(answer.relative_residual) == pytest.approx(residual, rel=1e-12)
    assert ends(answer) == (5, MAX_STEPS)
    assert ends(Neumann(5, step_size=0.9).solve(rows(a), one(b)))[1] == DIVERGED
    assert ends(Neumann().solve(rows(-a), one(b)))[1] == DIVERGED
    assert ends(Neumann().solve(rows(a), torch.zeros(1, 6)))[1] == ZERO
    assert ends(Neumann().solve(rows(a), torch.full((1, 6), math.nan)))[1] == NON_FINITE
    start = torch.linalg.solve(a, b)
    assert ends(Neumann().solve(rows(a), one(b), one(start)))[0] == 0


def test_direct_solve_of_every_kind_of_matrix() -> None:
    b, solver = torch.randn(1, 4), Direct()
    indefinite = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1.0]))
    answer = solver.solve(rows(indefinite), b)
    assert relative_error([answer.solution[0]], [torch.linalg.solve(indefinite, b[0])]) < 1e-14
    assert ends(answer)[1] == NOT_POSITIVE and float(answer.relative_residual) < 1e-15
    singular = solver.solve(torch.zeros_like, b)
    assert ends(singular)[1] == NOT_POSITIVE and float(singular.relative_residual) == 1.0
    assert ends(solver.solve(rows(indefinite), torch.zeros(1, 4)))[1] == ZERO
    assert ends(solver.solve(lambda v: v * math.nan, b))[1] == NON_FINITE
    with pytest.raises(ValueError, match=r"linear=Direct\(\): expected at most .* linear=CG\(\)"):
        solver.solve(lambda v: v, torch.ones(1, LARGEST + 1))


def test_largest_curvature_counts_both_signs() -> None:
    q = torch.linalg.qr(torch.randn(30, 30))[0]
    a = q @ torch.diag(torch.linspace(-9.0, 5.0, 30)) @ q.t()
    found = largest_curvature(rows(a), torch.ones(1, 30), max_steps=30)
    assert float(found) == pytest.approx(9.0, rel=0.02)
    assert largest_curvature(torch.zeros_like, torch.ones(1, 3)).tolist() == [0.0]


# T systems at once


def spd(n: int, condition: float) -> Tensor:
    q = torch.linalg.qr(torch.randn(n, n))[0]
    return q @ torch.diag(torch.logspace(0, math.log10(condition), n)) @ q.t()


def systems() -> tuple[Tensor, Tensor]:
    """One for every way to end."""
    saddle = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, -1.0]))
    matrices = [spd(6, 3.0), spd(6, 1e6), torch.eye(6), saddle, torch.full((6, 6), math.nan),
                torch.zeros(6, 6), 1e5 * spd(6, 10.0), torch.eye(6)]  # fmt: skip
    b = torch.randn(8, 6)
    b[2], b[7, 3] = 0.0, math.inf
    return torch.stack(matrices), b


SOLVERS: list[tuple[LinearSolver, set[str]]] = [
    (CG(4, 1e-2), {CONVERGED, MAX_STEPS, ZERO, NOT_POSITIVE, NON_FINITE}),
    (Neumann(15, 1e-2), {CONVERGED, MAX_STEPS, ZERO, DIVERGED, NON_FINITE}),
    (Neumann(15, 1e-2, step_size=0.3), {CONVERGED, MAX_STEPS, ZERO, DIVERGED, NON_FINITE}),
    (Direct(), {CONVERGED, ZERO, NOT_POSITIVE, NON_FINITE}),
]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("solver, reasons", SOLVERS, ids=[repr(s) for s, _ in SOLVERS])
def test_each_of_a_mixed_batch_has_its_own_answer(
    solver: LinearSolver, reasons: set[str], started: bool
) -> None:
    """What one task meets is no other's business, whatever the reason that it ends for."""
    a, b = systems()
    start = torch.randn(8, 6) if started else None
    together = solver.solve(lambda p: torch.einsum("tij,tj->ti", a, p), b, start)
    assert set(together.reason) == reasons
    for t in range(len(b)):
        own = None if start is None else start[t : t + 1]
        alone = solver.solve(rows(a[t]), b[t : t + 1], own)
        assert (int(together.steps[t]), together.reason[t]) == ends(alone)
        assert torch.allclose(together.solution[t], alone.solution[0], rtol=1e-12, atol=1e-14)
        pair = together.relative_residual[t], alone.relative_residual[0]
        assert torch.allclose(*pair, rtol=1e-9, atol=1e-14)


def test_largest_curvatures_of_several_matrices() -> None:
    a, _ = systems()
    a[0] *= 1e100
    found = largest_curvature(lambda p: torch.einsum("tij,tj->ti", a, p), torch.ones(8, 6))
    good = [0, 1, 2, 3, 5, 6, 7]
    expected = torch.linalg.eigvalsh(a[good]).abs().amax(1)
    assert torch.allclose(found[good], expected, rtol=0.02)
    assert float(found[4]) == math.inf


def test_largest_curvature_where_the_steps_do_not_suffice() -> None:
    a = spd(12, 1e3)
    found = largest_curvature(rows(a), torch.ones(1, 12), max_steps=2)
    assert float(found) == pytest.approx(1e3, rel=0.5)
