"""Preconditioned, truncated and approximate solvers against dense matrices and SciPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from head_cases import CLASSES, case
from oracles import relative_error, subroutine_1
from scipy.sparse import linalg as scipy_linalg
from torch import Tensor

from l2l_implicit import CG, Identity, Jacobi, Kronecker, LinearSolver, Nystrom
from l2l_implicit.inner_problem.losses import CrossEntropy, OutputLoss, SquaredError
from l2l_implicit.linear_solvers.solution import (
    APPROXIMATED,
    CONVERGED,
    MAX_STEPS,
    NON_FINITE,
    NOT_POSITIVE,
    TRUNCATED,
    ZERO,
    System,
)

pytestmark = pytest.mark.usefixtures("float64")
Matvec = Callable[[Tensor], Tensor]
KINDS: list[type[OutputLoss]] = [CrossEntropy, SquaredError]


def spd(n: int, condition: float = 1e4) -> Tensor:
    q = torch.linalg.qr(torch.randn(n, n))[0]
    return q @ torch.diag(torch.logspace(0, math.log10(condition), n)) @ q.t()


def rows(a: Tensor) -> Matvec:
    """Products with one matrix ``[n, n]``, or with those of T tasks."""
    return (lambda p: p @ a) if a.dim() == 2 else lambda p: torch.einsum("tij,tj->ti", a, p)


class Dense:
    """A preconditioner given as a matrix."""

    def __init__(self, inverse: Tensor) -> None:
        self.matrix = inverse

    def inverse(self, hvp: Matvec, like: Tensor) -> Matvec:
        return rows(self.matrix)


# Conjugate gradient with a preconditioner.


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_it_is_subroutine_1_in_the_preconditioners_coordinates(steps: int, warm: bool) -> None:
    """With M^-1 = C C' the iterates are C times those of the system C' A C for C' b."""
    a, b, m = spd(8), torch.randn(3, 8), spd(8, 50.0)
    c = torch.linalg.cholesky(torch.linalg.inv(m))
    start = torch.linalg.solve(a, b.t()).t() + 1e-6 * torch.randn(3, 8) if warm else None
    got = CG(steps, 1e-14, preconditioner=Dense(c @ c.t())).solve(rows(a), b, start)
    assert got.reason == [MAX_STEPS] * 3 and got.steps.tolist() == [steps] * 3
    for t in range(3):
        y = None if start is None else torch.linalg.solve(c, start[t])
        expected = c @ subroutine_1((c.t() @ a @ c).mv, c.t() @ b[t], steps, y)
        assert relative_error([got.solution[t]], [expected]) < 1e-9
        left = float((b[t] - a @ got.solution[t]).norm() / b[t].norm())
        assert float(got.relative_residual[t]) == pytest.approx(left, rel=1e-6)


def test_it_is_scipys() -> None:
    a, b, inverse = spd(12), torch.randn(12), torch.linalg.inv(spd(12, 30.0))
    name = "rtol" if "rtol" in signature(scipy_linalg.cg).parameters else "tol"  # before scipy 1.12
    expected, info = scipy_linalg.cg(
        a.numpy(), b.numpy(), maxiter=500, M=inverse.numpy(), **{name: 1e-10}
    )
    solver = CG(500, 1e-10, preconditioner=Dense(inverse))
    got = solver.solve(rows(a), b.unsqueeze(0))
    assert info == 0 and got.reason == [CONVERGED]
    assert relative_error([got.solution[0]], [torch.as_tensor(expected)]) < 1e-6


def test_the_tolerance_is_that_of_the_users_residual() -> None:
    """Not of the preconditioned one, which a bad preconditioner makes as small as it likes."""
    a, b = spd(30), torch.randn(2, 30)
    scaled = CG(400, 1e-6, preconditioner=Dense(1e-9 * torch.linalg.inv(torch.diag(a.diagonal()))))
    got = scaled.solve(rows(a), b)
    left = (b - got.solution @ a).norm(dim=1) / b.norm(dim=1)
    assert got.reason == [CONVERGED] * 2 and float(left.max()) <= 1.001e-6
    assert torch.allclose(got.relative_residual, left, rtol=1e-3)


def test_the_inverse_itself_needs_one_step() -> None:
    a, b = spd(10, 1e8), torch.randn(2, 10)
    got = CG(5, 1e-6, preconditioner=Dense(torch.linalg.inv(a))).solve(rows(a), b)
    assert got.steps.tolist() == [1, 1] and got.reason == [CONVERGED] * 2


def test_a_preconditioner_that_is_not_positive_is_said() -> None:
    got = CG(preconditioner=Dense(-torch.eye(4))).solve(rows(spd(4)), torch.randn(2, 4))
    assert got.reason == [NOT_POSITIVE] * 2 and not got.solution.any()
    broken = CG(preconditioner=Dense(math.nan * torch.eye(4))).solve(rows(spd(4)), torch.ones(1, 4))
    assert broken.reason == [NON_FINITE] and bool(broken.solution.isfinite().all())


@pytest.mark.parametrize("wrong", [Jacobi, "jacobi", CG()], ids=repr)
def test_what_is_no_preconditioner_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"preconditioner: expected Jacobi.* a method inverse"):
        CG(preconditioner=wrong)


# Jacobi.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tasks, kind", [(t, kind) for t in (1, 3) for kind in KINDS])
def test_the_diagonal_of_a_head_is_exact(tasks: int, kind: type[OutputLoss], bias: bool) -> None:
    found = case(kind, tasks, bias=bias)
    system = System(found.heads.hvp, 0.3, found.heads)
    diagonal = found.hessians().diagonal(dim1=1, dim2=2) + 0.3
    r = torch.randn_like(diagonal)
    assert relative_error([Jacobi().inverse(system, r)(r)], [r / diagonal]) < 1e-13
    assert system.calls == 0


def test_the_estimate_of_a_diagonal() -> None:
    """Exact for a diagonal matrix from one probe; else right on average, within its spread."""
    d, r = torch.logspace(0, 6, 9), torch.randn(2, 9)
    assert relative_error([Jacobi(1).inverse(lambda p: p * d, r)(r)], [r / d]) < 1e-13
    a, probes = spd(6, 10.0), 4000
    found = 1.0 / Jacobi(probes).inverse(rows(a), r[:1, :6])(torch.ones(1, 6))
    off = (
        (a - torch.diag(a.diagonal())).square().sum(1).mul(2).sqrt()
    )  # above one probe's deviation
    assert bool(((found[0] - a.diagonal()).abs() <= 5 * off / math.sqrt(probes)).all())


def test_the_estimate_is_no_smaller_than_what_is_known() -> None:
    """An indefinite matrix has entries below l2 and damping, of either sign."""
    d = torch.tensor([4.0, -3.0, 0.1, 2.0])
    system = System(lambda p: p * d, damping=0.5)
    inverse = Jacobi(1).inverse(system, torch.ones(1, 4))(torch.ones(1, 4))
    assert torch.allclose(inverse, 1.0 / torch.tensor([[4.5, 0.5, 0.6, 2.5]]))


# Kronecker.


@pytest.mark.parametrize("m", [3, 40], ids=["few samples", "many samples"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tasks, kind", [(t, kind) for t in (1, 3) for kind in KINDS])
def test_kronecker_is_the_inverse_of_the_kronecker_product(
    tasks: int, kind: type[OutputLoss], bias: bool, m: int
) -> None:
    """Written out for the matrix of a head: its rows one after the other, and then the bias."""
    found = case(kind, tasks, bias=bias, x=torch.randn(tasks, m, 5))
    loss, x = found.heads.loss, found.heads.problem.x
    r = torch.randn_like(found.heads.point)
    got = Kronecker().inverse(System(found.heads.hvp, 0.3, found.heads), r)(r)
    for t in range(tasks):
        full = torch.cat([x[t], torch.ones(m, 1)], 1) if bias else x[t]
        d = full.shape[1]
        p = loss.outputs[t].softmax(1)
        each = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        if kind is SquaredError:
            each = 2.0 * torch.eye(CLASSES).expand(m, -1, -1)
        mean = loss.scale * each.mean(0)
        dense = torch.kron(mean, full.t() @ full) + 0.5 * torch.eye(CLASSES * d)
        weight, rest = r[t][: CLASSES * 5].view(CLASSES, 5), r[t][CLASSES * 5 :].view(CLASSES, -1)
        v = torch.linalg.solve(dense, torch.cat([weight, rest], 1).reshape(-1)).view(CLASSES, d)
        expected = torch.cat([v[:, :5].reshape(-1), v[:, 5:].reshape(-1)])
        assert relative_error([got[t]], [expected]) < 1e-11


def test_for_the_squared_error_one_step_is_enough() -> None:
    found = case(SquaredError, 3, l2=1e-6)
    system, b = System(found.heads.hvp, 0.0, found.heads), torch.randn_like(found.heads.point)
    got = CG(20, 1e-6, preconditioner=Kronecker()).solve(system, b)
    assert got.reason == [CONVERGED] * 3 and int(got.steps.max()) == 1
    exact = torch.linalg.solve(found.hessians(), b.unsqueeze(2)).squeeze(2)
    assert relative_error([got.solution], [exact]) < 1e-6


@pytest.mark.parametrize("head", [True, False])
def test_kronecker_wants_a_regularised_head(head: bool) -> None:
    heads = case(CrossEntropy, 1, l2=0.0).heads
    hvp = System(heads.hvp, 0.0, heads) if head else rows(spd(4))
    got = "l2=0 and no damping" if head else "products alone"
    with pytest.raises(ValueError, match=f"expected a linear head .* got ({got}); use") as caught:
        CG(preconditioner=Kronecker()).solve(hvp, torch.ones_like(heads.point))
    assert "\n" not in str(caught.value)


# Nystrom.


def listened(a: Tensor) -> tuple[Matvec, list[Tensor]]:
    """Products, and the vectors that were asked for."""
    asked: list[Tensor] = []

    def product(p: Tensor) -> Tensor:
        asked.append(p.clone())
        return rows(a)(p)

    return product, asked


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_nystrom_is_the_dense_approximation_and_its_inverse(rank: int, tasks: int) -> None:
    a = torch.stack([spd(8, 100.0) for _ in range(tasks)])
    b, mu = torch.randn(tasks, 8), 0.7
    hvp, asked = listened(a + mu * torch.eye(8))
    got = Nystrom(rank, damping=mu).solve(hvp, b)
    omega = torch.stack([p[0] for p in asked[:-1]], 1)
    assert omega.shape == (8, min(rank, 8)) and got.steps.tolist() == [min(rank, 8) + 1] * tasks
    for t in range(tasks):
        y = a[t] @ omega
        dense = y @ torch.linalg.solve(omega.t() @ y, y.t()) + mu * torch.eye(8)
        assert relative_error([got.solution[t]], [torch.linalg.solve(dense, b[t])]) < 1e-10
        left = b[t] - (a[t] + mu * torch.eye(8)) @ got.solution[t]
        assert float(got.relative_residual[t] - left.norm() / b[t].norm()) == pytest.approx(0.0)
    assert got.reason == [APPROXIMATED] * tasks


def low_rank(n: int, rank: int) -> Tensor:
    half = torch.randn(n, rank)
    return half @ half.t()


@pytest.mark.parametrize("rank", [3, 5, 12])
def test_a_matrix_of_that_rank_is_solved_exactly(rank: int) -> None:
    a, b = low_rank(30, 3), torch.randn(2, 30)
    full = a + 1e-3 * torch.eye(30)
    exact = torch.linalg.solve(full, b.t()).t()
    got = Nystrom(rank, damping=1e-3).solve(rows(full), b)
    assert relative_error([got.solution], [exact]) < 1e-8
    assert float(got.relative_residual.max()) < 1e-8


def test_as_a_preconditioner_it_takes_the_large_eigenvalues_away() -> None:
    """Ten of 1e8 and the rest between 1 and 2: what is left is conditioned by about 2."""
    q = torch.linalg.qr(torch.randn(60, 60))[0]
    a = q @ torch.diag(torch.cat([torch.logspace(6, 8, 10), torch.linspace(0, 1, 50)])) @ q.t()
    system = System(rows(a), damping=1.0)
    b = torch.randn(2, 60)
    plain = CG(500, 1e-8, damping=1.0).solve(system, b)
    with_it = CG(500, 1e-8, preconditioner=Nystrom(15)).solve(system, b)
    assert with_it.reason == [CONVERGED] * 2
    assert int((with_it.steps - 15).max()) < 20 < int(plain.steps.min())
    exact = torch.linalg.solve(a + torch.eye(60), b.t()).t()
    assert relative_error([with_it.solution], [exact]) < 1e-6
    unknown = CG(500, 1e-8, preconditioner=Nystrom(60)).solve(rows(a + torch.eye(60)), b)
    assert int((unknown.steps - 60).max()) < 5  # l2 not known: the sketch is of all


def test_negative_curvature_is_left_out_and_said() -> None:
    a = torch.diag(torch.tensor([5.0, 3.0, -4.0, 0.0]))
    b = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    got = Nystrom(4, damping=1.0).solve(rows(a + torch.eye(4)), b)
    assert got.reason == [NOT_POSITIVE] and bool(got.solution.isfinite().all())
    assert bool(got.solution.abs().max() <= 1.0 + 1e-9), "longer than b over the damping"


def test_nystrom_without_a_shift_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Nystrom\(\): expected l2 or damping above 0.* got 0"):
        Nystrom().solve(rows(spd(4)), torch.ones(1, 4))


# One step.


@pytest.mark.parametrize("tasks", [1, 3])
def test_one_step_is_as_wrong_as_the_step_contracts(tasks: int) -> None:
    """|v - H^-1 b| <= rho |H^-1 b|, with equality along the flattest direction."""
    values, q = torch.logspace(-2, 0, 9), torch.linalg.qr(torch.randn(9, 9))[0]
    a, step = q @ torch.diag(values) @ q.t(), 1.2
    rho = float((1 - step * values).abs().max())
    for b in (torch.randn(tasks, 9), q[:, :1].t().expand(tasks, 9)):
        exact = torch.linalg.solve(a, b.t()).t()
        got = Identity(step).solve(rows(a), b)
        assert torch.equal(got.solution, step * b) and got.reason == [APPROXIMATED] * tasks
        error = (got.solution - exact).norm(dim=1) / exact.norm(dim=1)
        assert bool((error <= rho * (1 + 1e-12)).all())
        left = (b - step * b @ a).norm(dim=1) / b.norm(dim=1)
        assert torch.allclose(got.relative_residual, left)
    assert float(error.min()) == pytest.approx(rho)


# Truncated.


def krylov(a: Tensor, b: Tensor, steps: int) -> list[Tensor]:
    """Zero, then the minima of v'Av/2 - b'v in the spaces of b, Ab, ...: conjugate gradient's."""
    found, q = [torch.zeros_like(b)], (b / b.norm()).unsqueeze(1)
    for _ in range(steps):
        found.append(q @ torch.linalg.solve(q.t() @ a @ q, q.t() @ b))
        q = torch.linalg.qr(torch.cat([q, a @ q[:, -1:]], 1))[0]
    return found


def test_truncated_changes_nothing_where_the_loss_is_convex() -> None:
    a, b = low_rank(20, 6), torch.randn(3, 20)
    system = System(rows(a), damping=0.1)
    solvers = CG(50, 1e-9, 0.1), CG(50, 1e-9, 0.1, truncated=True)
    plain, short = (solver.solve(system, b) for solver in solvers)
    assert torch.equal(plain.solution, short.solution) and plain.reason == short.reason


def test_truncated_ends_on_the_sphere_between_two_steps() -> None:
    """The path from step to step, by dense matrices; the first two are convex, and then not."""
    values = torch.tensor([9.0, 7.0, 5.0, 3.0, 0.05, -0.5])
    q = torch.linalg.qr(torch.randn(6, 6))[0]
    a, b, mu = q @ torch.diag(values) @ q.t(), torch.randn(1, 6), 0.5
    radius = float(b.norm()) / mu
    got = CG(20, 1e-9, damping=mu, truncated=True).solve(rows(a), b)
    assert got.reason == [TRUNCATED] and float(got.solution.norm()) == pytest.approx(radius)
    taken = int(got.steps)
    path = krylov(a, b[0], taken)
    assert all(float(v.norm()) < radius for v in path[:-1])
    before, after = path[-2], path[-1]
    move, along = got.solution[0] - before, after - before
    assert abs(float(move @ along)) == pytest.approx(float(move.norm() * along.norm()), rel=1e-6)

    def model(v: Tensor) -> float:
        return float(v @ a @ v / 2 - b[0] @ v)

    assert model(got.solution[0]) < model(before)
    left = float((b[0] - a @ got.solution[0]).norm() / b.norm())
    assert float(got.relative_residual) == pytest.approx(left, rel=1e-9)


def test_truncated_wants_a_bound() -> None:
    with pytest.raises(ValueError, match=r"truncated=True.*: expected l2 or damping above 0"):
        CG(truncated=True).solve(rows(spd(4)), torch.ones(1, 4))


# What all have in common.


EVERY: list[LinearSolver] = [
    CG(preconditioner=Jacobi(2)), CG(preconditioner=Nystrom(2)), CG(damping=0.5, truncated=True),
    Nystrom(2, damping=0.5), Identity(0.1),
]  # fmt: skip
every = pytest.mark.parametrize("solver", EVERY, ids=repr)


@every
def test_zero_and_what_is_not_finite(solver: LinearSolver) -> None:
    a = spd(4) + 0.5 * torch.eye(4)
    for start in (None, torch.ones(3, 4)):
        b = torch.tensor([[0.0] * 4, [1.0] * 4, [math.nan, 1.0, 1.0, 1.0]])
        got = solver.solve(rows(a), b, start)
        assert got.reason[0] == ZERO and not got.solution[0].any()
        assert got.reason[2] == NON_FINITE and not got.solution[2].any()
        assert got.relative_residual.tolist()[::2] == [0.0, math.inf]
    broken = torch.stack([a, math.nan * a])
    got = solver.solve(rows(broken), torch.ones(2, 4))
    assert got.reason[1] == NON_FINITE != got.reason[0]
    assert bool(got.solution.isfinite().all())
    assert float(got.relative_residual[1]) in (1.0, math.inf)  # that of zero, or not known
    alone = solver.solve(rows(a), torch.ones(1, 4))
    assert torch.allclose(got.solution[0], alone.solution[0], rtol=1e-12)


@every
def test_random_numbers_are_its_own_and_the_same_at_each_call(solver: LinearSolver) -> None:
    a, b, state = spd(6) + 0.5 * torch.eye(6), torch.randn(2, 6), torch.get_rng_state()
    first, second = solver.solve(rows(a), b), solver.solve(rows(a), b)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.solution, second.solution)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every
def test_the_dtype_is_that_of_the_right_hand_side(solver: LinearSolver, dtype: torch.dtype) -> None:
    got = solver.solve(rows((spd(5, 10.0) + torch.eye(5)).to(dtype)), torch.ones(1, 5, dtype=dtype))
    assert got.solution.dtype == dtype


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Jacobi(0), "Jacobi: probes: expected at least 1, got 0"),
        (lambda: Nystrom(0), "Nystrom: rank: expected at least 1, got 0"),
        (lambda: Nystrom(damping=-1.0), "Nystrom: damping: expected a number of at least 0"),
        (lambda: Identity(0.0), "Identity: step_size: expected a number above 0"),
        (lambda: Identity(damping=-1.0), "Identity: damping: expected a number of at least 0"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
