"""The linear solvers on systems whose answers are known, alone and several at once.

Of conjugate gradient: what published versions get wrong, and what must never come out.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from oracles import rows, spd
from torch import Tensor
from torch.testing import assert_close

from l2l_implicit import CG, Direct, Identity, Jacobi, LinearSolver, Neumann, Nystrom
from l2l_implicit.linear_solvers import solution as reasons
from l2l_implicit.linear_solvers.curvature import largest_curvature
from l2l_implicit.linear_solvers.direct import LARGEST

pytestmark = pytest.mark.usefixtures("float64")


class Answer(NamedTuple):
    """What a solver says of one system."""

    solution: Tensor
    steps: int
    residual: float
    reason: str


def solve(solver: LinearSolver, a: Any, b: Tensor, start: Tensor | None = None) -> Answer:
    """One system, of a matrix or of its products."""
    matvec = rows(a) if isinstance(a, Tensor) else a
    got = solver.solve(matvec, b.unsqueeze(0), None if start is None else start.unsqueeze(0))
    return Answer(got.solution[0], int(got.steps), float(got.relative_residual), got.reason[0])


def residual(a: Tensor, v: Tensor, b: Tensor) -> float:
    return float((b - a @ v).norm() / b.norm())


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_exact_after_as_many_steps_as_distinct_eigenvalues(rank: int) -> None:
    q = torch.linalg.qr(torch.randn(8, 8))[0]
    a = q @ torch.diag(1.0 + torch.arange(8) % rank) @ q.t()
    b = torch.randn(8)
    answer = solve(CG(20, 1e-11), a, b)
    assert answer.steps == rank and answer.reason == reasons.CONVERGED
    assert_close(answer.solution, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    a -= q[:, :2] @ q[:, :2].t() @ a  # singular, but consistent
    answer = solve(CG(20, 1e-10), a, a @ b)
    assert answer.reason == reasons.CONVERGED and answer.steps <= rank
    assert_close(answer.solution, torch.linalg.pinv(a) @ a @ b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("value", [1e6, 1e300, math.nan, math.inf])
def test_start_worse_than_none_is_dropped(value: float) -> None:
    a, b, start = spd(5), torch.randn(5), torch.full((5,), value)
    assert torch.equal(solve(CG(3), a, b, start).solution, solve(CG(3), a, b).solution)
    assert bool((start == start[0]).all()) or math.isnan(value)  # the caller's tensor is left alone


DIAGONALS = [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 2.0, -1.0], [-1.0, -2.0, -3.0]]


@pytest.mark.parametrize("diagonal", DIAGONALS, ids=str)
@pytest.mark.parametrize("max_steps", [1, 5, 2000])
def test_without_a_solution_that_it_could_find(diagonal: list[float], max_steps: int) -> None:
    """Singular, zero, indefinite, negative: finite, no worse than zero, and said."""
    a, b = torch.diag(torch.tensor(diagonal)), torch.ones(3)
    v, _, said, reason = solve(CG(max_steps), a, b)
    assert torch.isfinite(v).all() and v.norm() < 1e3
    assert reason == reasons.NOT_POSITIVE or max_steps < 2000 and reason == reasons.MAX_STEPS
    assert residual(a, v, b) == pytest.approx(said, rel=1e-6)
    assert float(v @ (a @ v) / 2 - b @ v) <= 0.0
    if max(diagonal) <= 0.0:
        assert torch.equal(v, torch.zeros(3)) and reason == reasons.NOT_POSITIVE


def test_neumann_is_its_series_and_says_how_far_it_got() -> None:
    a, b = torch.diag(torch.linspace(1.0, 4.0, 6)), torch.randn(6)
    answer = solve(Neumann(5, 1e-12, step_size=0.2), a, b)
    series = sum(torch.linalg.matrix_power(torch.eye(6) - 0.2 * a, j) @ b for j in range(5))
    assert_close(answer.solution, 0.2 * series, rtol=1e-13, atol=1e-14)
    assert answer.residual == pytest.approx(residual(a, answer.solution, b), rel=1e-12)
    assert (answer.steps, answer.reason) == (5, reasons.MAX_STEPS)
    assert solve(Neumann(5, step_size=0.9), a, b).reason == reasons.DIVERGED
    assert solve(Neumann(), -a, b).reason == reasons.DIVERGED
    assert solve(Neumann(), a, b, torch.linalg.solve(a, b)).steps == 0


def test_direct_solve_of_every_kind_of_matrix() -> None:
    b = torch.randn(4)
    indefinite = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1.0]))
    answer = solve(Direct(), indefinite, b)
    assert_close(answer.solution, torch.linalg.solve(indefinite, b), rtol=1e-14, atol=0)
    assert answer.reason == reasons.NOT_POSITIVE and answer.residual < 1e-15
    singular = solve(Direct(), torch.zeros_like, b)
    assert singular.reason == reasons.NOT_POSITIVE and singular.residual == 1.0
    with pytest.raises(ValueError, match=r"linear=Direct\(\): expected at most .* linear=CG\(\)"):
        solve(Direct(), lambda v: v, torch.ones(LARGEST + 1))


EVERY: list[LinearSolver] = [
    CG(), Neumann(), Direct(), CG(preconditioner=Jacobi(2)), CG(preconditioner=Nystrom(2)),
    CG(damping=0.5, truncated=True), Nystrom(2, damping=0.5), Identity(0.1),
]  # fmt: skip


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_zero_and_what_is_not_finite(solver: LinearSolver) -> None:
    """The answers of each kind, in b's dtype; random numbers are its own and the same each time."""
    a, state = spd(4) + 0.5 * torch.eye(4), torch.get_rng_state()
    for start in (None, torch.ones(3, 4)):
        b = torch.tensor([[0.0] * 4, [1.0] * 4, [math.nan, 1.0, 1.0, 1.0]])
        got = solver.solve(rows(a), b, start)
        assert got.reason[0] == reasons.ZERO and not got.solution[0].any()
        assert got.reason[2] == reasons.NON_FINITE and not got.solution[2].any()
        assert got.relative_residual.tolist()[::2] == [0.0, math.inf]
    got = solver.solve(rows(torch.stack([a, math.nan * a])), torch.ones(2, 4))
    assert got.reason[1] == reasons.NON_FINITE != got.reason[0]
    assert bool(got.solution.isfinite().all())
    assert float(got.relative_residual[1]) in (1.0, math.inf)  # that of zero, or not known
    alone, again = (solver.solve(rows(a), torch.ones(1, 4)).solution for _ in range(2))
    assert torch.allclose(got.solution[0], alone, rtol=1e-12) and torch.equal(alone, again)
    assert torch.equal(torch.get_rng_state(), state)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = solver.solve(rows(a.to(dtype)), torch.ones(1, 4, dtype=dtype))
        assert got.solution.dtype == dtype and bool(got.solution.isfinite().all())


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_ends_of_the_range_of_float64(solver: LinearSolver) -> None:
    """Neither zero nor infinite: the answer for 1, scaled."""
    a, b = torch.diag(torch.tensor([1.0, 2.0, 3.0])), torch.ones(3)
    one = solve(solver, a, b)
    for scale in (1e-320, 1e-310, 1e-300, 1e300, 1e307):
        v, steps, left, reason = solve(solver, a, b * scale)
        assert torch.allclose(v, one.solution * scale, rtol=1e-12, atol=1e-323)
        assert left == pytest.approx(one.residual) and (steps, reason) == (one.steps, one.reason)


def test_a_system_of_no_unknowns() -> None:
    assert solve(CG(), torch.eye(0), torch.zeros(0)).reason == reasons.ZERO


def systems() -> tuple[Tensor, Tensor]:
    """One for every way to end."""
    saddle = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, -1.0]))
    matrices = [spd(6, 3.0), spd(6, 1e6), torch.eye(6), saddle, torch.full((6, 6), math.nan),
                torch.zeros(6, 6), 1e5 * spd(6, 10.0), torch.eye(6)]  # fmt: skip
    b = torch.randn(8, 6)
    b[2], b[7, 3] = 0.0, math.inf
    return torch.stack(matrices), b


COMMON = {reasons.CONVERGED, reasons.ZERO, reasons.NON_FINITE}
SOLVERS: list[tuple[LinearSolver, set[str]]] = [
    (CG(4, 1e-2), {reasons.MAX_STEPS, reasons.NOT_POSITIVE}),
    (Neumann(15, 1e-2), {reasons.MAX_STEPS, reasons.DIVERGED}),
    (Neumann(15, 1e-2, step_size=0.3), {reasons.MAX_STEPS, reasons.DIVERGED}),
    (Direct(), {reasons.NOT_POSITIVE}),
]


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("solver, reasons", SOLVERS, ids=[repr(s) for s, _ in SOLVERS])
def test_each_of_a_mixed_batch_has_its_own_answer(
    solver: LinearSolver, reasons: set[str], started: bool
) -> None:
    """What one task meets is no other's business, whatever the reason that it ends for."""
    a, b = systems()
    start = torch.randn(8, 6) if started else None
    together = solver.solve(rows(a), b, start)
    assert set(together.reason) == reasons | COMMON
    for t in range(len(b)):
        alone = solve(solver, a[t], b[t], None if start is None else start[t])
        assert (int(together.steps[t]), together.reason[t]) == (alone.steps, alone.reason)
        assert torch.allclose(together.solution[t], alone.solution, rtol=1e-12, atol=1e-14)
        said = float(together.relative_residual[t])
        assert said == pytest.approx(alone.residual, rel=1e-9, abs=1e-14)


def test_largest_curvatures() -> None:
    """Of several matrices, and of both signs."""
    a, _ = systems()
    a[0] *= 1e100
    found = largest_curvature(rows(a), torch.ones(8, 6))
    good = [0, 1, 2, 3, 5, 6, 7]
    expected = torch.linalg.eigvalsh(a[good]).abs().amax(1)
    assert torch.allclose(found[good], expected, rtol=0.02) and float(found[4]) == math.inf
    q = torch.linalg.qr(torch.randn(30, 30))[0]
    two_signs = q @ torch.diag(torch.linspace(-9.0, 5.0, 30)) @ q.t()
    found = largest_curvature(rows(two_signs), torch.ones(1, 30), max_steps=30)
    assert float(found) == pytest.approx(9.0, rel=0.02)
    # What the last product leaves is added: a Ritz value alone is never above the eigenvalue.
    spread = torch.diag(torch.linspace(-9.0, 5.0, 200, dtype=torch.float64))
    for steps in (3, 5, 10):
        found = largest_curvature(rows(spread), torch.ones(1, 200).double(), max_steps=steps)
        assert 9.0 < float(found) < 9.5
