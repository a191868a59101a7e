"""The linear solvers on systems whose answers are known, alone and several at once.

Of conjugate gradient: what published versions get wrong, and what must never come out.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from oracles import relative_error, subroutine_1
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
Matvec = Callable[[Tensor], Tensor]  # of rows, [T, n]
TASKS: list[int] = [1]


class Answer(NamedTuple):
    """The first task's part of a `LinearSolution`."""

    solution: Tensor
    steps: int
    relative_residual: float
    reason: str


@pytest.fixture(params=[1, 3], ids=["alone", "of three"])
def tasks(request: pytest.FixtureRequest) -> Iterator[None]:
    """How many systems `cg` solves at once."""
    TASKS.append(request.param)
    yield
    TASKS.pop()


both = pytest.mark.usefixtures("tasks")


def rows(a: Tensor) -> Matvec:
    """Products of rows with a symmetric matrix."""
    return lambda p: p @ a


def cg(
    matvec: Matvec, b: Tensor, start: Tensor | None = None, max_steps: int = 20, tol: float = 1e-4
) -> Answer:
    """The system, and with it minus itself and itself at half size, which must answer alike."""
    factors = torch.tensor([1.0, -1.0, 0.5]).to(b)[: TASKS[-1]].unsqueeze(1)
    starts = None if start is None else factors * start
    answer = CG(max_steps, tol).solve(matvec, factors * b, starts)
    first, *others = (
        Answer(v, int(steps), float(residual), reason)
        for v, steps, residual, reason in zip(
            answer.solution, answer.steps, answer.relative_residual, answer.reason, strict=True
        )
    )
    for factor, other in zip(factors[1:], others, strict=True):
        # Powers of two and signs change no digit, but where numbers are denormal or too large.
        if b.numel() and 1e-300 < float(b.abs().max()) < 1e300 and b.dtype == torch.float64:
            assert other.steps == first.steps and other.reason == first.reason
            assert torch.allclose(other.solution, factor * first.solution, rtol=1e-12, atol=1e-300)
    return first


def spd(n: int, condition: float = 100.0) -> Tensor:
    """A random symmetric matrix with eigenvalues from 1 to ``condition``, evenly in the log."""
    q = torch.linalg.qr(torch.randn(n, n))[0]
    return q @ torch.diag(torch.logspace(0, math.log10(condition), n)) @ q.t()


def residual(a: Tensor, v: Tensor, b: Tensor) -> float:
    return float((b - a @ v).norm() / b.norm())


def energy(a: Tensor, v: Tensor, b: Tensor) -> float:
    """What CG makes smaller at each step: its error in the norm of A, but for a constant."""
    return float(v @ (a @ v) / 2 - b @ v)


# Conjugate gradient.


@both
@pytest.mark.parametrize("rank", [1, 2, 4, 8])
def test_exact_after_as_many_steps_as_distinct_eigenvalues(rank: int) -> None:
    q = torch.linalg.qr(torch.randn(8, 8))[0]
    a = q @ torch.diag(1.0 + torch.arange(8) % rank) @ q.t()
    b = torch.randn(8)
    answer = cg(rows(a), b, max_steps=20, tol=1e-11)
    assert answer.steps == rank and answer.reason == CONVERGED
    assert relative_error([answer.solution], [torch.linalg.solve(a, b)]) < 1e-9
    a -= q[:, :2] @ q[:, :2].t() @ a  # singular, but consistent
    answer = cg(rows(a), a @ b, max_steps=20, tol=1e-10)
    assert answer.reason == CONVERGED and answer.steps <= rank
    assert relative_error([answer.solution], [torch.linalg.pinv(a) @ a @ b]) < 1e-8


@both
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("condition", [3.0, 1e3])
def test_is_subroutine_1(steps: int, warm: bool, condition: float) -> None:
    a, b, calls = spd(6, condition), torch.randn(6), []
    start = torch.linalg.solve(a, b) + 1e-3 * torch.randn(6) if warm else None
    got = cg(lambda p: (calls.append(1), p @ a)[1], b, start, steps, tol=1e-15)
    assert relative_error([got.solution], [subroutine_1(a.mv, b, steps, start)]) < 1e-12
    assert (got.steps, got.reason, len(calls)) == (steps, MAX_STEPS, steps + warm)


@both
@pytest.mark.parametrize("value", [1e6, 1e300, math.nan, math.inf])
def test_start_worse_than_none_is_dropped(value: float) -> None:
    a, b, start = spd(5), torch.randn(5), torch.full((5,), value)
    got = cg(rows(a), b, start=start, max_steps=3)
    assert torch.equal(got.solution, cg(rows(a), b, max_steps=3).solution)
    assert bool((start == start[0]).all()) or math.isnan(value)  # the caller's tensor is left alone


DIAGONALS = [[0.0, 1.0, 2.0], [0.0, 0.0, 0.0], [3.0, 2.0, -1.0], [-1.0, -2.0, -3.0]]


@both
@pytest.mark.parametrize("diagonal", DIAGONALS, ids=str)
@pytest.mark.parametrize("max_steps", [1, 5, 2000])
def test_without_a_solution_that_it_could_find(diagonal: list[float], max_steps: int) -> None:
    """Singular, zero, indefinite, negative: finite, no worse than zero, and said."""
    a, b = torch.diag(torch.tensor(diagonal)), torch.ones(3)
    answer = cg(rows(a), b, max_steps=max_steps)
    assert torch.isfinite(answer.solution).all() and answer.solution.norm() < 1e3
    assert answer.reason == NOT_POSITIVE or max_steps < 2000 and answer.reason == MAX_STEPS
    assert residual(a, answer.solution, b) == pytest.approx(answer.relative_residual, rel=1e-6)
    assert energy(a, answer.solution, b) <= 0.0
    if max(diagonal) <= 0.0:
        assert torch.equal(answer.solution, torch.zeros(3)) and answer.reason == NOT_POSITIVE


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("after", [None, 0, 2], ids=["b", "first product", "third product"])
def test_not_finite(bad: float, after: int | None) -> None:
    a, b, calls = spd(5, 1e3), torch.randn(5), []
    if after is None:
        b[1] = bad

    def matvec(p: Tensor) -> Tensor:
        calls.append(1)
        return p @ a if after is None or len(calls) <= after else torch.full_like(p, bad)

    answer = cg(matvec, b, max_steps=5)
    assert answer.reason == NON_FINITE or (bad == -math.inf and answer.reason == NOT_POSITIVE)
    assert torch.isfinite(answer.solution).all()
    expected = math.inf if after is None else residual(a, answer.solution, b)
    assert answer.relative_residual == pytest.approx(expected)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a_scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("b_scale", [1e-30, 1.0, 1e30])
def test_scale_of_matrix_and_right_hand_side(
    dtype: torch.dtype, a_scale: float, b_scale: float
) -> None:
    a, b = spd(5, 10.0).to(dtype), torch.randn(5).to(dtype)
    exact = torch.linalg.solve(a.double(), b.double()) * (b_scale / a_scale)
    answer = cg(lambda p: (p @ a) * a_scale, b * b_scale, tol=1e-5)
    if float(exact.abs().max()) > torch.finfo(dtype).max:
        assert answer.reason == NON_FINITE and not answer.solution.any()
    else:
        assert answer.reason == CONVERGED
        if float(exact.abs().min()) > torch.finfo(dtype).tiny:
            assert relative_error([answer.solution.double()], [exact]) < 1e-4


@both
@pytest.mark.parametrize("exponent", [-320, -310, -300, 300, 307])
def test_ends_of_the_range_of_float64(exponent: int) -> None:
    answer = cg(rows(torch.eye(3)), torch.ones(3) * 10.0**exponent)
    assert torch.allclose(answer.solution, torch.ones(3) * 10.0**exponent, rtol=1e-12, atol=0)


def random_system(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Any symmetric matrix: definite or not, singular or not, of any scale."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    n = 1 + pick(7)
    eigenvalues = torch.exp(3 * draw(n))
    kind = pick(4)
    if kind == 1:
        eigenvalues[: pick(n + 1)] = 0.0
    elif kind == 2:
        eigenvalues = eigenvalues * draw(n).sign()
    q = torch.linalg.qr(draw(n, n))[0]
    a = q @ torch.diag(eigenvalues) @ q.t() * 10.0 ** (pick(13) - 6)
    b = a @ draw(n) if kind == 3 or pick(2) else draw(n)
    return (a + a.t()) / 2, b * 10.0 ** (pick(13) - 6)


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tol", [1e-3, 1e-8, 1e-14])
def test_sweep_is_finite_and_truthful(dtype: torch.dtype, tol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        a, b = (t.to(dtype) for t in random_system(generator))
        steps = 1 + int(torch.randint(12, (1,), generator=generator))
        answer = cg(rows(a), b, max_steps=steps, tol=tol)
        v = answer.solution
        assert bool(torch.isfinite(v).all()) and v.dtype == dtype
        assert answer.steps <= steps and 0 <= answer.relative_residual
        if answer.reason == ZERO:
            assert not b.any()
            continue
        assert answer.reason in (CONVERGED, MAX_STEPS, NOT_POSITIVE)
        true = (b.double() - a.double() @ v.double()).norm()
        rounding = 50 * torch.finfo(dtype).eps * (b.norm() + a.norm() * v.norm()).double()
        said = answer.relative_residual * float(b.double().norm())
        assert abs(true - said) <= rounding + 1e-6 * said
        v, size = v.double(), float(b.double().norm() * v.double().norm())
        assert energy(a.double(), v, b.double()) <= 50 * torch.finfo(dtype).eps * size
        if answer.reason == CONVERGED:
            assert true <= tol * (1 + 1e-6) * b.double().norm() + rounding
        else:
            assert answer.relative_residual > tol


# The others.


def ends(answer: LinearSolution) -> tuple[int, str]:
    """Steps and reason of the only task."""
    assert len(answer.steps) == len(answer.reason) == 1
    return int(answer.steps), answer.reason[0]


@pytest.mark.parametrize("solver, n", [(CG(), 0), (CG(), 4), (Neumann(), 4), (Direct(), 4)])
def test_zero_right_hand_side(solver: LinearSolver, n: int) -> None:
    for start in (None, torch.ones(1, n)):
        answer = solver.solve(rows(spd(n) if n else torch.eye(0)), torch.zeros(1, n), start)
        assert ends(answer)[1] == ZERO and float(answer.relative_residual) == 0.0
        assert torch.equal(answer.solution, torch.zeros(1, n))


def test_neumann_is_its_series_and_says_how_far_it_got() -> None:
    a, b = torch.diag(torch.linspace(1.0, 4.0, 6)), torch.randn(1, 6)
    answer = Neumann(5, 1e-12, step_size=0.2).solve(rows(a), b)
    series = sum(torch.linalg.matrix_power(torch.eye(6) - 0.2 * a, j) @ b[0] for j in range(5))
    assert relative_error([answer.solution[0]], [0.2 * series]) < 1e-14
    true = residual(a, answer.solution[0], b[0])
    assert float(answer.relative_residual) == pytest.approx(true, rel=1e-12)
    assert ends(answer) == (5, MAX_STEPS)
    assert ends(Neumann(5, step_size=0.9).solve(rows(a), b))[1] == DIVERGED
    assert ends(Neumann().solve(rows(-a), b))[1] == DIVERGED
    assert ends(Neumann().solve(rows(a), torch.full((1, 6), math.nan)))[1] == NON_FINITE
    assert ends(Neumann().solve(rows(a), b, torch.linalg.solve(a, b[0]).unsqueeze(0)))[0] == 0


def test_direct_solve_of_every_kind_of_matrix() -> None:
    b, solver = torch.randn(1, 4), Direct()
    indefinite = torch.diag(torch.tensor([3.0, 2.0, 1.0, -1.0]))
    answer = solver.solve(rows(indefinite), b)
    assert relative_error([answer.solution[0]], [torch.linalg.solve(indefinite, b[0])]) < 1e-14
    assert ends(answer)[1] == NOT_POSITIVE and float(answer.relative_residual) < 1e-15
    singular = solver.solve(torch.zeros_like, b)
    assert ends(singular)[1] == NOT_POSITIVE and float(singular.relative_residual) == 1.0
    assert ends(solver.solve(lambda v: v * math.nan, b))[1] == NON_FINITE
    with pytest.raises(ValueError, match=r"linear=Direct\(\): expected at most .* linear=CG\(\)"):
        solver.solve(lambda v: v, torch.ones(1, LARGEST + 1))


# T systems at once.


def systems() -> tuple[Tensor, Tensor]:
    """One for every way to end."""
    saddle = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, -1.0]))
    matrices = [spd(6, 3.0), spd(6, 1e6), torch.eye(6), saddle, torch.full((6, 6), math.nan),
                torch.zeros(6, 6), 1e5 * spd(6, 10.0), torch.eye(6)]  # fmt: skip
    b = torch.randn(8, 6)
    b[2], b[7, 3] = 0.0, math.inf
    return torch.stack(matrices), b


COMMON = {CONVERGED, ZERO, NON_FINITE}
SOLVERS: list[tuple[LinearSolver, set[str]]] = [
    (CG(4, 1e-2), {MAX_STEPS, NOT_POSITIVE}),
    (Neumann(15, 1e-2), {MAX_STEPS, DIVERGED}),
    (Neumann(15, 1e-2, step_size=0.3), {MAX_STEPS, DIVERGED}),
    (Direct(), {NOT_POSITIVE}),
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
    assert set(together.reason) == reasons | COMMON
    for t in range(len(b)):
        own = None if start is None else start[t : t + 1]
        alone = solver.solve(rows(a[t]), b[t : t + 1], own)
        assert (int(together.steps[t]), together.reason[t]) == ends(alone)
        assert torch.allclose(together.solution[t], alone.solution[0], rtol=1e-12, atol=1e-14)
        pair = together.relative_residual[t], alone.relative_residual[0]
        assert torch.allclose(*pair, rtol=1e-9, atol=1e-14)


def test_largest_curvatures() -> None:
    """Of several matrices, and of both signs."""
    a, _ = systems()
    a[0] *= 1e100
    found = largest_curvature(lambda p: torch.einsum("tij,tj->ti", a, p), torch.ones(8, 6))
    good = [0, 1, 2, 3, 5, 6, 7]
    expected = torch.linalg.eigvalsh(a[good]).abs().amax(1)
    assert torch.allclose(found[good], expected, rtol=0.02) and float(found[4]) == math.inf
    q = torch.linalg.qr(torch.randn(30, 30))[0]
    two_signs = q @ torch.diag(torch.linspace(-9.0, 5.0, 30)) @ q.t()
    found = largest_curvature(rows(two_signs), torch.ones(1, 30), max_steps=30)
    assert float(found) == pytest.approx(9.0, rel=0.02)


def test_largest_curvature_where_the_steps_do_not_suffice() -> None:
    """What the last product leaves is added: without it half would be missing."""
    found = largest_curvature(rows(spd(12, 1e3)), torch.ones(1, 12), max_steps=2)
    assert float(found) == pytest.approx(1e3, rel=0.5)
