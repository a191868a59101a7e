"""Conjugate gradient: what published versions get wrong, and what must never come out.

Each system is solved alone and as one of three.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from oracles import relative_error, subroutine_1

from l2l_implicit import CG
from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
    MAX_STEPS,
    NON_FINITE,
    NOT_POSITIVE,
    ZERO,
)

pytestmark = pytest.mark.usefixtures("float64")


Matvec = Callable[[torch.Tensor], torch.Tensor]  # of rows, [T, n]


class Answer(NamedTuple):
    """The first task's part of a `LinearSolution`."""

    solution: torch.Tensor
    steps: int
    relative_residual: float
    reason: str


@pytest.fixture(params=[1, 3], ids=["alone", "of three"], autouse=True)
def tasks(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many systems `cg` solves at once."""
    TASKS.append(request.param)
    yield request.param
    TASKS.pop()


TASKS: list[int] = []


def rows(a: torch.Tensor) -> Matvec:
    """Products of rows with a symmetric matrix."""
    return lambda p: p @ a


def cg(
    matvec: Matvec, b: torch.Tensor, start: torch.Tensor | None = None, max_steps: int = 20,
    tol: float = 1e-4,
) -> Answer:  # fmt: skip
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


def spd(n: int, condition: float = 100.0) -> torch.Tensor:
    """A random symmetric matrix with eigenvalues from 1 to ``condition``, evenly in the log."""
    q = torch.linalg.qr(torch.randn(n, n))[0]
    return q @ torch.diag(torch.logspace(0, math.log10(condition), n)) @ q.t()


def residual(a: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> float:
    return float((b - a @ v).norm() / b.norm())


def test_identity_takes_one_step() -> None:
    b = torch.randn(5)
    answer = cg(rows(torch.eye(5)), b)
    assert torch.allclose(answer.solution, b, rtol=1e-15, atol=0)
    assert (answer.steps, answer.reason) == (1, CONVERGED)


@pytest.mark.parametrize("factor", [1e-30, 0.3, 7.0, 1e30])
def test_multiple_of_identity(factor: float) -> None:
    b = torch.randn(5)
    answer = cg(lambda p: factor * p, b)
    assert relative_error([answer.solution], [b / factor]) < 1e-15
    assert answer.steps == 1


@pytest.mark.parametrize("start", [None, torch.ones(3)])
def test_zero_right_hand_side(start: torch.Tensor | None) -> None:
    answer = cg(rows(spd(3)), torch.zeros(3), start=start)
    assert torch.equal(answer.solution, torch.zeros(3))
    assert (answer.steps, answer.relative_residual) == (0, 0.0)
    assert answer.reason == ZERO


def test_empty_system() -> None:
    answer = cg(lambda p: p, torch.zeros(0))
    assert answer.solution.shape == (0,) and answer.reason == ZERO


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_exact_after_as_many_steps_as_distinct_eigenvalues(rank: int) -> None:
    q = torch.linalg.qr(torch.randn(8, 8))[0]
    a = q @ torch.diag(1.0 + torch.arange(8) % rank) @ q.t()
    b = torch.randn(8)
    answer = cg(rows(a), b, max_steps=20, tol=1e-12)
    assert answer.steps == rank and answer.reason == CONVERGED
    assert residual(a, answer.solution, b) < 1e-12


def test_exact_after_n_steps() -> None:
    a, b = spd(6, 10.0), torch.randn(6)
    answer = cg(rows(a), b, max_steps=6, tol=1e-10)
    assert answer.reason == CONVERGED
    assert relative_error([answer.solution], [torch.linalg.solve(a, b)]) < 1e-9


def test_stops_early_at_its_tolerance() -> None:
    a, b = spd(50, 1e4), torch.randn(50)
    answers = [cg(rows(a), b, max_steps=500, tol=tol) for tol in (1e-1, 1e-4, 1e-8)]
    assert all(answer.reason == CONVERGED for answer in answers)
    assert answers[0].steps < answers[1].steps < answers[2].steps < 500
    for answer, tol in zip(answers, (1e-1, 1e-4, 1e-8), strict=True):
        assert residual(a, answer.solution, b) <= tol * (1 + 1e-6)
        assert answer.relative_residual <= tol


def test_one_step_is_steepest_descent() -> None:
    a, b = spd(5), torch.randn(5)
    answer = cg(rows(a), b, max_steps=1)
    steepest = (b @ b) / (b @ a @ b) * b
    assert torch.allclose(answer.solution, steepest, rtol=1e-13)
    assert (answer.steps, answer.reason) == (1, MAX_STEPS)


def test_counts_its_products() -> None:
    calls, a, b = [], spd(5), torch.randn(5)
    answer = cg(lambda p: (calls.append(1), p @ a)[1], b, max_steps=4, tol=1e-14)
    assert answer.steps == len(calls) == 4


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("condition", [3.0, 1e3])
def test_is_subroutine_1(steps: int, warm: bool, condition: float) -> None:
    a, b = spd(6, condition), torch.randn(6)
    start = torch.linalg.solve(a, b) + 1e-3 * torch.randn(6) if warm else None
    got = cg(rows(a), b, start=start, max_steps=steps, tol=1e-15).solution
    assert relative_error([got], [subroutine_1(a.mv, b, steps, start)]) < 1e-12


def energy(a: torch.Tensor, v: torch.Tensor, b: torch.Tensor) -> float:
    """What CG makes smaller at each step: its error in the norm of A, but for a constant."""
    return float(v @ (a @ v) / 2 - b @ v)


def test_its_last_iterate_is_its_best() -> None:
    """The residual may rise above that of zero; the error falls at every step."""
    a = torch.diag(torch.tensor([0.1, 1.0, 1.1, 1.2, 50.0, 1e4]))
    b = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.01])
    answers = [cg(rows(a), b, max_steps=n, tol=1e-12) for n in range(1, 7)]
    residuals = [residual(a, answer.solution, b) for answer in answers]
    assert max(residuals) > 1.0
    assert [answer.relative_residual for answer in answers] == pytest.approx(residuals, rel=1e-6)
    energies = [0.0, *(energy(a, answer.solution, b) for answer in answers)]
    assert all(later < before for before, later in itertools.pairwise(energies))


# Warm starts


def test_start_at_the_solution_costs_no_step() -> None:
    a, b = spd(5), torch.randn(5)
    exact = torch.linalg.solve(a, b)
    answer = cg(rows(a), b, start=exact)
    assert torch.allclose(answer.solution, exact, rtol=1e-14) and answer.steps == 0
    assert answer.reason == CONVERGED


def test_start_nearby_saves_steps() -> None:
    a, b = spd(30, 1e3), torch.randn(30)
    near = torch.linalg.solve(a, b) + 1e-5 * torch.randn(30)
    cold = cg(rows(a), b, max_steps=300, tol=1e-4)
    warm = cg(rows(a), b, start=near, max_steps=300, tol=1e-4)
    assert warm.reason == cold.reason == CONVERGED and warm.steps < cold.steps


@pytest.mark.parametrize("value", [1e6, 1e300, math.nan, math.inf])
def test_start_worse_than_none_is_dropped(value: float) -> None:
    a, b = spd(5), torch.randn(5)
    start = torch.full((5,), value)
    got = cg(rows(a), b, start=start, max_steps=3)
    assert torch.equal(got.solution, cg(rows(a), b, max_steps=3).solution)
    assert bool((start == start[0]).all()) or math.isnan(value)  # the caller's tensor is left alone


# Systems that are not positive definite


def test_singular_but_consistent() -> None:
    q = torch.linalg.qr(torch.randn(6, 6))[0]
    a = q @ torch.diag(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0])) @ q.t()
    b = a @ torch.randn(6)
    answer = cg(rows(a), b, max_steps=50, tol=1e-10)
    assert answer.reason == CONVERGED and answer.steps == 4
    assert relative_error([answer.solution], [torch.linalg.pinv(a) @ b]) < 1e-8


@pytest.mark.parametrize("max_steps", [1, 5, 50, 2000])
def test_singular_and_inconsistent(max_steps: int) -> None:
    a, b = torch.diag(torch.tensor([0.0, 1.0, 2.0])), torch.ones(3)
    answer = cg(rows(a), b, max_steps=max_steps)
    assert torch.isfinite(answer.solution).all() and answer.solution.norm() < 1e3
    assert answer.reason in (NOT_POSITIVE, MAX_STEPS)
    assert residual(a, answer.solution, b) == pytest.approx(answer.relative_residual, rel=1e-6)
    assert answer.relative_residual >= 1 / math.sqrt(3) - 1e-9
    assert energy(a, answer.solution, b) < 0.0


def test_zero_matrix() -> None:
    answer = cg(torch.zeros_like, torch.ones(3))
    assert torch.equal(answer.solution, torch.zeros(3)) and answer.reason == NOT_POSITIVE
    assert answer.relative_residual == 1.0


def test_indefinite() -> None:
    a, b = torch.diag(torch.tensor([3.0, 2.0, -1.0])), torch.tensor([1.0, 1.0, 0.5])
    answer = cg(rows(a), b, max_steps=50)
    assert answer.reason == NOT_POSITIVE and answer.relative_residual <= 1
    assert residual(a, answer.solution, b) == pytest.approx(answer.relative_residual)


def test_negative_definite() -> None:
    answer = cg(rows(-spd(4)), torch.randn(4))
    assert torch.equal(answer.solution, torch.zeros(4)) and answer.reason == NOT_POSITIVE


# Values that are not finite, very large, very small


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_right_hand_side_not_finite(bad: float) -> None:
    answer = cg(rows(torch.eye(3)), torch.tensor([1.0, bad, 1.0]))
    assert torch.equal(answer.solution, torch.zeros(3)) and answer.reason == NON_FINITE
    assert answer.relative_residual == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("after", [0, 2])
def test_matrix_not_finite(bad: float, after: int) -> None:
    a, b, calls = spd(5, 1e3), torch.randn(5), []

    def matvec(p: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return p @ a if len(calls) <= after else torch.full_like(p, bad)

    answer = cg(matvec, b, max_steps=5)
    assert answer.reason == NON_FINITE or (bad == -math.inf and answer.reason == NOT_POSITIVE)
    assert torch.isfinite(answer.solution).all()
    assert residual(a, answer.solution, b) == pytest.approx(answer.relative_residual)


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


@pytest.mark.parametrize("exponent", [-320, -310, -300, 300, 307])
def test_ends_of_the_range_of_float64(exponent: int) -> None:
    answer = cg(rows(torch.eye(3)), torch.ones(3) * 10.0**exponent)
    assert torch.allclose(answer.solution, torch.ones(3) * 10.0**exponent, rtol=1e-12, atol=0)


# A sweep


def random_system(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Any symmetric matrix: definite or not, singular or not, of any scale."""

    def draw(*shape: int) -> torch.Tensor:
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tol", [1e-3, 1e-8, 1e-14])
def test_sweep_is_finite_and_truthful(dtype: torch.dtype, tol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
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
