"""Preconditioned, truncated and approximate solvers against dense matrices."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from head_cases import CLASSES, case, each
from oracles import relative_error, rows, spd, subroutine_1
from torch import Tensor

from l2l_implicit import CG, Identity, Jacobi, Kronecker, Nystrom
from l2l_implicit.inner_problem.losses import CrossEntropy, OutputLoss, SquaredError
from l2l_implicit.linear_solvers import solution as reasons
from l2l_implicit.linear_solvers.solution import System

pytestmark = pytest.mark.usefixtures("float64")
Matvec = Callable[[Tensor], Tensor]


class Dense:
    """A preconditioner given as a matrix."""

    def __init__(self, inverse: Tensor) -> None:
        self.matrix = inverse

    def inverse(self, hvp: Matvec, like: Tensor) -> Matvec:
        return rows(self.matrix)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("condition", [3.0, 1e3, 1e4])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_it_is_subroutine_1(steps: int, warm: bool, condition: float, plain: bool) -> None:
    """In the preconditioner's coordinates: with M^-1 = C C' the iterates are C times those of the
    system C' A C for C' b."""
    a, b, calls = spd(8, condition), torch.randn(3, 8), []
    c = torch.eye(8) if plain else torch.linalg.cholesky(torch.linalg.inv(spd(8, 50.0)))
    near = torch.linalg.solve(a, b.t()).t() + 1e-2 / condition * torch.randn(3, 8)
    start = near if warm else None
    solver = CG(steps, 1e-15, preconditioner=None if plain else Dense(c @ c.t()))
    got = solver.solve(lambda p: (calls.append(1), p @ a)[1], b, start)
    assert got.reason == [reasons.MAX_STEPS] * 3 and got.steps.tolist() == [steps] * 3
    assert len(calls) == steps + warm
    for t in range(3):
        y = None if start is None else torch.linalg.solve(c, start[t])
        expected = c @ subroutine_1((c.t() @ a @ c).mv, c.t() @ b[t], steps, y)
        assert relative_error([got.solution[t]], [expected]) < (1e-12 if plain else 1e-9)
        left = float((b[t] - a @ got.solution[t]).norm() / b[t].norm())
        assert float(got.relative_residual[t]) == pytest.approx(left, rel=1e-6)


def test_the_tolerance_is_that_of_the_users_residual() -> None:
    """Not of the preconditioned one, which a bad preconditioner makes as small as it likes."""
    a, b = spd(30, 1e4), torch.randn(2, 30)
    scaled = CG(400, 1e-6, preconditioner=Dense(1e-9 * torch.linalg.inv(torch.diag(a.diagonal()))))
    got = scaled.solve(rows(a), b)
    left = (b - got.solution @ a).norm(dim=1) / b.norm(dim=1)
    assert got.reason == [reasons.CONVERGED] * 2 and float(left.max()) <= 1.001e-6
    assert torch.allclose(got.relative_residual, left, rtol=1e-3)


def test_a_preconditioner_that_is_not_positive_is_said() -> None:
    got = CG(preconditioner=Dense(-torch.eye(4))).solve(rows(spd(4)), torch.randn(2, 4))
    assert got.reason == [reasons.NOT_POSITIVE] * 2 and not got.solution.any()
    broken = CG(preconditioner=Dense(math.nan * torch.eye(4))).solve(rows(spd(4)), torch.ones(1, 4))
    assert broken.reason == [reasons.NON_FINITE] and bool(broken.solution.isfinite().all())


@pytest.mark.parametrize("bias", [True, False])
@each
def test_the_diagonal_of_a_head_is_exact(tasks: int, kind: type[OutputLoss], bias: bool) -> None:
    found = case(kind, tasks, bias=bias)
    system = System(found.heads.hvp, 0.3, found.heads)
    diagonal = found.hessians().diagonal(dim1=1, dim2=2) + 0.3
    r = torch.randn_like(diagonal)
    assert relative_error([Jacobi().inverse(system, r)(r)], [r / diagonal]) < 1e-13
    assert system.calls == 0


def test_the_estimate_of_a_diagonal() -> None:
    """Exact for a diagonal matrix from one probe; else right on average, within its spread.

    And no smaller than what is known: an indefinite matrix has entries below l2 and damping.
    """
    d, r = torch.logspace(0, 6, 9), torch.randn(2, 9)
    assert relative_error([Jacobi(1).inverse(lambda p: p * d, r)(r)], [r / d]) < 1e-13
    a, probes = spd(6, 10.0), 4000
    found = 1.0 / Jacobi(probes).inverse(rows(a), r[:1, :6])(torch.ones(1, 6))
    # One probe's deviation is at most:
    off = (a - torch.diag(a.diagonal())).square().sum(1).mul(2).sqrt()
    assert bool(((found[0] - a.diagonal()).abs() <= 5 * off / math.sqrt(probes)).all())
    system = System(lambda p: p * torch.tensor([4.0, -3.0, 0.1, 2.0]), damping=0.5)
    inverse = Jacobi(1).inverse(system, torch.ones(1, 4))(torch.ones(1, 4))
    assert torch.allclose(inverse, 1.0 / torch.tensor([[4.5, 0.5, 0.6, 2.5]]))


@pytest.mark.parametrize("m", [3, 40], ids=["few samples", "many samples"])
@pytest.mark.parametrize("bias", [True, False])
@each
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


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("rank", [1, 3, 8, 20])
def test_nystrom_is_the_dense_approximation_and_its_inverse(rank: int, tasks: int) -> None:
    a = torch.stack([spd(8, 100.0) for _ in range(tasks)])
    b, mu, asked = torch.randn(tasks, 8), 0.7, []
    full = a + mu * torch.eye(8)
    got = Nystrom(rank, damping=mu).solve(lambda p: (asked.append(p.clone()), rows(full)(p))[1], b)
    omega = torch.stack([p[0] for p in asked[:-1]], 1)
    assert omega.shape == (8, min(rank, 8)) and got.steps.tolist() == [min(rank, 8) + 1] * tasks
    for t in range(tasks):
        y = a[t] @ omega
        dense = y @ torch.linalg.solve(omega.t() @ y, y.t()) + mu * torch.eye(8)
        assert relative_error([got.solution[t]], [torch.linalg.solve(dense, b[t])]) < 1e-10
        left = b[t] - full[t] @ got.solution[t]
        assert float(got.relative_residual[t] - left.norm() / b[t].norm()) == pytest.approx(0.0)
    assert got.reason == [reasons.APPROXIMATED] * tasks


def test_as_a_preconditioner_it_takes_the_large_eigenvalues_away() -> None:
    """Ten of 1e8 and the rest between 1 and 2: what is left is conditioned by about 2."""
    q = torch.linalg.qr(torch.randn(60, 60))[0]
    a = q @ torch.diag(torch.cat([torch.logspace(6, 8, 10), torch.linspace(0, 1, 50)])) @ q.t()
    system = System(rows(a), damping=1.0)
    b = torch.randn(2, 60)
    plain = CG(500, 1e-8, damping=1.0).solve(system, b)
    with_it = CG(500, 1e-8, preconditioner=Nystrom(15)).solve(system, b)
    assert with_it.reason == [reasons.CONVERGED] * 2
    assert int((with_it.steps - 15).max()) < 20 < int(plain.steps.min())
    exact = torch.linalg.solve(a + torch.eye(60), b.t()).t()
    assert relative_error([with_it.solution], [exact]) < 1e-6
    unknown = CG(500, 1e-8, preconditioner=Nystrom(60)).solve(rows(a + torch.eye(60)), b)
    assert int((unknown.steps - 60).max()) < 5  # l2 not known: the sketch is of all


def test_negative_curvature_is_left_out_and_said() -> None:
    a = torch.diag(torch.tensor([5.0, 3.0, -4.0, 0.0]))
    b = torch.tensor([[1.0, 1.0, 0.0, 1.0]])
    got = Nystrom(4, damping=1.0).solve(rows(a + torch.eye(4)), b)
    assert got.reason == [reasons.NOT_POSITIVE] and bool(got.solution.isfinite().all())
    assert bool(got.solution.abs().max() <= 1.0 + 1e-9), "longer than b over the damping"


@pytest.mark.parametrize("tasks", [1, 3])
def test_one_step_is_as_wrong_as_the_step_contracts(tasks: int) -> None:
    """|v - H^-1 b| <= rho |H^-1 b|, with equality along the flattest direction."""
    values, q = torch.logspace(-2, 0, 9), torch.linalg.qr(torch.randn(9, 9))[0]
    a, step = q @ torch.diag(values) @ q.t(), 1.2
    rho = float((1 - step * values).abs().max())
    for b in (torch.randn(tasks, 9), q[:, :1].t().expand(tasks, 9)):
        exact = torch.linalg.solve(a, b.t()).t()
        got = Identity(step).solve(rows(a), b)
        assert torch.equal(got.solution, step * b) and got.reason == [reasons.APPROXIMATED] * tasks
        error = (got.solution - exact).norm(dim=1) / exact.norm(dim=1)
        assert bool((error <= rho * (1 + 1e-12)).all())
        left = (b - step * b @ a).norm(dim=1) / b.norm(dim=1)
        assert torch.allclose(got.relative_residual, left)
    assert float(error.min()) == pytest.approx(rho)


def krylov(a: Tensor, b: Tensor, steps: int) -> list[Tensor]:
    """Zero, then the minima of v'Av/2 - b'v in the spaces of b, Ab, ...: conjugate gradient's."""
    found, q = [torch.zeros_like(b)], (b / b.norm()).unsqueeze(1)
    for _ in range(steps):
        found.append(q @ torch.linalg.solve(q.t() @ a @ q, q.t() @ b))
        q = torch.linalg.qr(torch.cat([q, a @ q[:, -1:]], 1))[0]
    return found


def test_truncated_changes_nothing_where_the_loss_is_convex() -> None:
    half, b = torch.randn(20, 6), torch.randn(3, 20)
    system = System(rows(half @ half.t()), damping=0.1)
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
    assert got.reason == [reasons.TRUNCATED] and float(got.solution.norm()) == pytest.approx(radius)
    path = krylov(a, b[0], int(got.steps))
    assert all(float(v.norm()) < radius for v in path[:-1])
    before, after = path[-2], path[-1]
    move, along = got.solution[0] - before, after - before
    assert abs(float(move @ along)) == pytest.approx(float(move.norm() * along.norm()), rel=1e-6)
    worth = [float(v @ a @ v / 2 - b[0] @ v) for v in (got.solution[0], before)]
    assert worth[0] < worth[1]
    left = float((b[0] - a @ got.solution[0]).norm() / b.norm())
    assert float(got.relative_residual) == pytest.approx(left, rel=1e-9)


def kronecker_on(hvp: Callable[[Any], Matvec]) -> Callable[[], Any]:
    def call() -> Any:
        heads = case(CrossEntropy, 1, l2=0.0).heads
        return CG(preconditioner=Kronecker()).solve(hvp(heads), torch.ones_like(heads.point))

    return call


def on_products(solver: Any) -> Callable[[], Any]:
    return lambda: solver.solve(rows(spd(4)), torch.ones(1, 4))


REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: CG(preconditioner=Jacobi), TypeError, "preconditioner: expected Jacobi.* a method"),
    (kronecker_on(lambda heads: System(heads.hvp, 0.0, heads)), ValueError,
     r"expected a linear head [^\n]* got l2=0 and no damping; use[^\n]*$"),
    (kronecker_on(lambda heads: heads.hvp), ValueError,
     r"expected a linear head [^\n]* got products alone; use[^\n]*$"),
    (on_products(Nystrom()), ValueError, r"Nystrom\(\): expected l2 or damping above 0.* got 0"),
    (on_products(CG(truncated=True)), ValueError, r"truncated=True.*: expected l2 or damping abo"),
    (lambda: Jacobi(0), ValueError, "Jacobi: probes: expected at least 1, got 0"),
    (lambda: Nystrom(damping=-1.0), ValueError, "Nystrom: damping: expected a number of at least"),
    (lambda: Identity(0.0), ValueError, "Identity: step_size: expected a number above 0"),
]  # fmt: skip


@pytest.mark.parametrize("call, kind, message", REFUSED)
def test_what_is_refused(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
