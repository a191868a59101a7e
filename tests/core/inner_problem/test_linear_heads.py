"""Linear heads in closed form against autograd and dense matrices, for one task and for three."""

from collections.abc import Callable

import pytest
import torch
from head_cases import CLASSES, KINDS, TORCH, WIDTH, Case, M, case, dense_minimum, each, targets_of
from oracles import relative_error
from torch import Tensor
from torch.func import hessian

from l2l_implicit import GradientDescent, Newton
from l2l_implicit.inner_problem import linear_heads
from l2l_implicit.inner_problem.linear_heads import GOALS, MOST_SAMPLES
from l2l_implicit.inner_problem.losses import CrossEntropy, OutputLoss, SquaredError
from l2l_implicit.linear_solvers.solution import FACTORED, NON_FINITE, ZERO

pytestmark = pytest.mark.usefixtures("float64")

SOLVED = 1e-10


def dense_inverse(loss: OutputLoss, kernel: Tensor, t: int) -> Tensor:
    """``S (I + K S)^-1``, which is ``(S^-1 + K)^-1`` where S has an inverse."""
    m, k = loss.outputs.shape[1:]

    def by_torch(z: Tensor) -> Tensor:
        return loss.scale * TORCH[type(loss)](z.view(m, k), loss.targets[t])

    s = hessian(by_torch)(loss.outputs[t].reshape(-1))
    big = torch.kron(kernel[t], torch.eye(k))
    return s @ torch.linalg.inv(torch.eye(m * k) + big @ s)


@each
@pytest.mark.parametrize("spread", [1.0, 12.0], ids=["moderate", "nearly one-hot"])
@pytest.mark.parametrize("rank", [2, M], ids=["singular kernel", "regular kernel"])
def test_the_inverse_is_that_of_the_dense_matrix(
    tasks: int, kind: type[OutputLoss], spread: float, rank: int
) -> None:
    """Also where S is singular, as the softmax's always is."""
    x = torch.randn(tasks, M, rank)
    kernel, y = 5.0 * x @ x.mT, targets_of(kind, tasks)
    loss = kind(spread * torch.randn(tasks, M, CLASSES), y, 1 / M)
    right = torch.randn(tasks, M, CLASSES)
    got = loss.inverse(kernel)(right)
    for t in range(tasks):
        expected = dense_inverse(loss, kernel, t) @ right[t].reshape(-1)
        assert relative_error([got[t].reshape(-1)], [expected]) < 1e-10


@each
def test_the_inverse_where_all_classes_are_alike(tasks: int, kind: type[OutputLoss]) -> None:
    """As at outputs of zero: one factor serves for every class."""
    x, y = torch.randn(tasks, M, WIDTH), targets_of(kind, tasks)
    kernel, loss = 5.0 * x @ x.mT, kind(torch.zeros_like(y), y, 1 / M)
    right = torch.randn(tasks, M, CLASSES)
    alike = loss.inverse(kernel, alike=True)(right)
    assert relative_error([alike], [loss.inverse(kernel)(right)]) < 1e-12


@each
def test_the_hessian_stays_within_the_movement(tasks: int, kind: type[OutputLoss]) -> None:
    """By the eigenvalues of one Hessian in the other's metric, at outputs nearly one-hot too."""
    z, y = 4.0 * torch.randn(tasks, M, CLASSES), targets_of(kind, tasks)
    change = torch.randn(tasks, M, CLASSES)
    change -= change.mean(-1, keepdim=True)  # which moves no softmax
    loss = kind(z, y, 1.0)
    omega, there = loss.movement(change.norm(dim=-1).amax(-1)), loss.moved(z + change)
    across = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.0]])  # a constant moves no softmax

    def blocks(at: OutputLoss) -> Tensor:  # each sample's part of S, ``[T, m, 2, 2]``
        columns = [at.curve(row.expand_as(z)) for row in torch.eye(CLASSES)]
        return across.t() @ torch.stack(columns, -1) @ across

    ratios = torch.linalg.eigvals(torch.linalg.solve(blocks(loss), blocks(there))).real
    assert bool((ratios.log().abs().amax((1, 2)) <= omega * (1 + 1e-6) + 1e-9).all())
    if kind is SquaredError:  # there it is the gradient that moves, by so much of its size
        moved = (there.gradient - loss.gradient).norm(dim=-1).amax(-1)
        sizes = loss.gradient.norm(dim=-1).amax(-1)
        assert torch.allclose(moved / sizes, omega)


@each
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("anchored", [True, False])
def test_minimum_is_the_dense_one(
    tasks: int, kind: type[OutputLoss], bias: bool, anchored: bool
) -> None:
    found = case(kind, tasks, bias=bias, anchored=anchored, l2=0.05)
    there = found.heads.minimum()
    assert there.solved and there.steps is not None and len(there.steps) == tasks
    assert max(there.steps) < 15
    assert relative_error([there.point], [dense_minimum(found)]) < 1e-12
    elsewhere = found.heads.moved(100.0 * torch.randn_like(there.point)).minimum()
    assert torch.equal(elsewhere.point, there.point)  # where it starts is of no matter


HOSTILE: dict[str, Callable[[Tensor], Tensor]] = {
    "small": lambda x: 1e-3 * x,
    "large": lambda x: 100.0 * x,
    "one huge constant": lambda x: torch.cat([x, torch.full_like(x[..., :1], 255.0)], -1),
    "duplicated features": lambda x: torch.cat([x, x, x], -1),
    "duplicated samples": lambda x: x[:, [0, 0, 0, 1, 1, 2, 3]],
    "zero": lambda x: 0.0 * x,
    "one zero sample": lambda x: x * (torch.arange(M) > 0).unsqueeze(1),
    "scales far apart": lambda x: x * torch.logspace(-3, 2, WIDTH),
    "wide": lambda x: torch.randn(len(x), M, 60),
}


@each
@pytest.mark.parametrize("data", HOSTILE)
@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_minimum_of_hostile_data(tasks: int, kind: type[OutputLoss], data: str, l2: float) -> None:
    x = HOSTILE[data](torch.randn(tasks, M, WIDTH))
    found = case(kind, tasks, anchored=False, l2=l2, x=x)
    assert_minimum(found.at(found.heads.minimum()))


def assert_minimum(there: Case) -> None:
    """A dense Newton step moves it by what rounding makes of a system of that condition."""
    left = torch.linalg.solve(there.hessians(), there.gradients().unsqueeze(2)).squeeze(2)
    condition = 1.0 + torch.linalg.matrix_norm(there.heads.problem.gram(), 2) / there.l2.detach()
    size = there.heads.point.norm(dim=1)
    assert bool((left.norm(dim=1) <= 1e-12 * size + 1e-15 * condition * size + 1e-30).all())


@pytest.mark.parametrize("tasks", [1, 3])
def test_minimum_where_long_steps_fail(tasks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an anchor whose outputs are saturated a whole Newton step overshoots by far."""
    found = case(CrossEntropy, tasks, x=30.0 * torch.randn(tasks, M, WIDTH), l2=1e-2)
    assert_minimum(found.at(found.heads.minimum()))
    monkeypatch.setattr(linear_heads, "_shortened", lambda loss, c, base, *step: step[:2])
    with pytest.raises((AssertionError, RuntimeError)):
        assert_minimum(found.at(found.heads.minimum()))


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_asks_for_its_own_digits_only(kind: type[OutputLoss]) -> None:
    """Float32's goal saves a step, not the digits that a float32 head can show."""
    x = torch.randn(2, M, WIDTH)
    found = case(kind, 2, x=x, goal=1e-6, l2=0.01)
    there = found.heads.minimum()
    assert relative_error([there.point], [dense_minimum(found)]) < 1e-6
    assert GOALS == {torch.float64: 1e-13}


def dense_solve(there: Case, b: Tensor, damping: float) -> Tensor:
    matrix = there.hessians() + damping * torch.eye(b.shape[1])
    return torch.linalg.solve(matrix, b.unsqueeze(2)).squeeze(2)


@each
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("goal", [None, 1e-6], ids=["all digits", "float32's"])
@pytest.mark.parametrize("width", [WIDTH, 40], ids=["few features", "many features"])
def test_systems_at_the_minimum_are_solved(
    tasks: int, kind: type[OutputLoss], damping: float, goal: float | None, width: int
) -> None:
    x = 3.0 * torch.randn(tasks, M, width)
    found = case(kind, tasks, l2=0.02, x=x, goal=goal)
    there = found.heads.minimum()
    b = torch.randn_like(there.point)
    answer = there.solve(b, damping)
    tol = goal or SOLVED
    assert relative_error([answer.solution], [dense_solve(found.at(there), b, damping)]) < 10 * tol
    residual = (b - there.hvp(answer.solution) - damping * answer.solution).norm(dim=1)
    assert bool((residual <= 10 * tol * b.norm(dim=1)).all())
    assert answer.reason == [FACTORED] * tasks and not answer.steps.any()
    assert answer.outputs is not None
    curved = there.loss.curve(there.problem.outputs(answer.solution))
    assert relative_error([answer.outputs], [curved]) < 10 * tol


def test_each_system_says_how_it_ended() -> None:
    there = case(CrossEntropy, 4).heads.minimum()
    b = torch.randn_like(there.point)
    b[1], b[2, 0], b[3, 1] = 0.0, torch.inf, torch.nan
    answer = there.solve(b, 0.0)
    assert answer.reason == [FACTORED, ZERO, NON_FINITE, NON_FINITE]
    assert bool(answer.solution.isfinite().all()) and not answer.solution[1:].any()
    assert answer.relative_residual[1] == 0.0
    assert bool(answer.relative_residual[2:].isinf().all())
    alone = there.solve(b[:1].expand(4, -1), 0.0)
    assert relative_error([answer.solution[:1]], [alone.solution[:1]]) < SOLVED


def test_what_the_recursion_leaves_to_single_steps() -> None:
    heads = case(CrossEntropy, 1).heads
    assert GradientDescent(adaptive=True).solve_heads(heads, 3, 0.1) is None
    assert GradientDescent(tol=1e-3).solve_heads(heads, 3, 0.1) is None
    assert Newton().solve_heads(case(CrossEntropy, 1, l2=0.0).heads, 3, 0.1) is None


@pytest.mark.parametrize("kind", KINDS)
def test_many_samples_are_solved_without_a_factor(kind: type[OutputLoss]) -> None:
    x = torch.randn(2, MOST_SAMPLES + 1, 2)
    found = case(kind, 2, x=x, l2=0.01, scale=1 / len(x[0]))
    assert found.heads.minimum() is None
    there = Newton().solve_heads(found.heads, 1, lr=0.1)
    assert there is not None and there.solved and there.steps is not None
    assert relative_error([there.point], [dense_minimum(found)]) < 1e-8
    b = torch.randn_like(there.point)
    answer = there.solve(b, damping=0.3)
    assert relative_error([answer.solution], [dense_solve(found.at(there), b, 0.3)]) < 1e-8
    assert answer.reason == ["converged"] * 2


def test_the_factor_serves_up_to_its_number_of_samples() -> None:
    x = torch.randn(1, MOST_SAMPLES, 2)
    assert case(CrossEntropy, 1, x=x).heads.minimum() is not None
    assert case(CrossEntropy, 1, l2=0.0).heads.minimum() is None
