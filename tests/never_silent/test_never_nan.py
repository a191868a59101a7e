"""Whatever the system or the head: a hypergradient is finite, or an error says why not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from small_task import adapt
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GradientDescent,
    ImplicitCGHead,
    InnerSolver,
    LinearSolution,
    LinearSolver,
    Neumann,
    Newton,
)
from l2l_implicit.linear_solvers.solution import CONVERGED

FEW, MANY = 60, 3000
SEEDS = st.integers(0, 2**31)
PHASES = [Phase.explicit, Phase.generate]  # a seed does not shrink to anything simpler
WRONG = (math.nan, math.inf, -math.inf)


class System(NamedTuple):
    """A symmetric system; ``condition`` is inf where it has no unique solution."""

    a: Tensor
    b: Tensor
    condition: float
    positive: bool


def spectrum(kind: str, n: int) -> Tensor:
    """Eigenvalues of a random matrix of this kind."""
    values = torch.logspace(0, -float(torch.randint(0, 8, ())), n)
    if kind == "singular":
        values[n // 2 :] = 0.0
    if kind == "indefinite":
        values[::2] *= -1.0
    if kind == "zero":
        values.zero_()
    return values


def system(seed: int, kind: str, size: int, scales: tuple[int, int], dtype: torch.dtype) -> System:
    """A random one, its entries and its right-hand side of sizes 10**scales."""
    torch.manual_seed(seed)
    values = spectrum(kind, size).double()
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    a, b = (q * values) @ q.t() * 10.0 ** scales[0], torch.randn(size).double() * 10.0 ** scales[1]
    smallest = float(values.abs().min())
    condition = float(values.abs().max()) / smallest if smallest else math.inf
    if kind == "zero b":
        b.zero_()
    if kind == "not finite":
        place = [a[0], b][seed % 2]
        place[0] = WRONG[seed % 3]
    return System(((a + a.t()) / 2).to(dtype), b.to(dtype), condition, bool((values > 0).all()))


def answers(given_: System) -> dict[str, LinearSolution]:
    """Each solver's, with the system as the first of three; the others are minus it and zero."""
    a, steps = given_.a, 3 * len(given_.b)
    b = torch.stack([given_.b, -given_.b, torch.zeros_like(given_.b)])

    def solve(solver: LinearSolver, start: Tensor | None = None) -> LinearSolution:
        return solver.solve(lambda p: p @ a, b, start)

    return {
        "cg": solve(CG(steps)),
        "cg, warm": solve(CG(steps), torch.full_like(b, 1e3)),
        "direct": solve(Direct()),
        "neumann": solve(Neumann(steps)),
    }


KINDS = ["definite", "singular", "indefinite", "zero", "zero b", "not finite"]
SYSTEMS: dict[str, Any] = {
    "seed": SEEDS,
    "kind": st.sampled_from(KINDS),
    "size": st.integers(1, 12),
    "scales": st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
    "dtype": st.sampled_from([torch.float64, torch.float32]),
}


def check_system(
    seed: int, kind: str, size: int, scales: tuple[int, int], dtype: torch.dtype
) -> None:
    given_ = system(seed, kind, size, scales, dtype)
    clean = bool(torch.isfinite(given_.a).all() and torch.isfinite(given_.b).all())
    for name, answer in answers(given_).items():
        assert bool(torch.isfinite(answer.solution).all()), (name, answer)
        assert not bool(answer.relative_residual.isnan().any()), (name, answer)
        if not clean:
            assert answer.reason[0] != CONVERGED or name == "neumann", (name, answer)
        exact = given_.b.dtype == torch.float64 and given_.condition < 1e4
        if answer.reason[0] == CONVERGED and exact:
            check_residual(name, given_, answer)


def check_residual(name: str, given_: System, answer: LinearSolution) -> None:
    """What is called converged is: by the true residual, not the recursion's."""
    residual = given_.b - given_.a @ answer.solution[0]
    scale = float(given_.b.abs().max())
    assert float(residual.abs().max()) <= 1e-3 * scale, (name, answer)


class Head(NamedTuple):
    """A random few-shot head and its task."""

    seed: int
    net: str
    scale: int
    query_scale: int
    wrong: bool
    dtype: torch.dtype
    options: dict[str, Any]
    how: str
    steps: int


LINEAR = st.one_of(
    st.builds(CG, steps=st.integers(1, 30)),
    st.builds(Neumann, steps=st.integers(1, 30)),
    st.just(Direct()),
)

HEADS = st.builds(
    Head,
    seed=SEEDS,
    net=st.sampled_from(["linear", "two layers", "no bias"]),
    scale=st.integers(-25, 25),
    query_scale=st.integers(-25, 25),
    wrong=st.sampled_from([False, False, False, True]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    options=st.fixed_dictionaries(
        {
            "lr": st.sampled_from([1e-6, 0.1, 1.0, 1e6]),
            "l2": st.sampled_from([0.0, 1e-8, 0.1, 10.0, 1e20]),
            "anchor": st.sampled_from(["zero", "init"]),
            "inner": st.one_of(
                st.builds(Newton, cg_steps=st.integers(1, 30)),
                st.builds(GradientDescent, adaptive=st.booleans()),
                st.just(LBFGS()),
            ),
            "linear": LINEAR,
        }
    ),
    how=st.sampled_from(["closure", "loss"]),
    steps=st.integers(1, 15),
)


def module_of(name: str) -> nn.Module:
    if name == "two layers":
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return nn.Linear(4, 3, bias=name != "no bias")


def check_head(head: Head) -> None:
    torch.manual_seed(head.seed)
    theta = torch.ones(4, dtype=head.dtype, requires_grad=True)
    x = torch.randn(9, 4, dtype=head.dtype) * 10.0**head.scale
    query = torch.randn(9, 4, dtype=head.dtype) * 10.0**head.query_scale
    if head.wrong:
        (x if head.seed % 2 else query)[3, 1] = WRONG[head.seed % 3]
    labels = torch.arange(9) % 3
    learner = ImplicitCGHead(module_of(head.net).to(head.dtype), **head.options).clone()
    try:
        h = x * theta
        h.retain_grad()  # theta's may overflow behind it, times features of 1e25
        adapt(learner, lambda: F.cross_entropy(learner(h), labels), head.how, head.steps)
        F.cross_entropy(learner(query), labels.roll(1)).backward()
    except (FloatingPointError, ValueError, RuntimeError) as error:
        assert "expected" in str(error) and "\n" not in str(error)
        return
    gradients = [h.grad, *(p.grad for p in learner.module.parameters() if p.is_leaf)]
    found = [g for g in gradients if g is not None]
    assert found and all(bool(torch.isfinite(g).all()) for g in found), head


BATCHES: dict[str, Any] = {
    "seed": SEEDS,
    "scale": st.integers(-25, 25),
    "wrong": st.sampled_from([False, False, True]),
    "l2": st.sampled_from([0.0, 1e-8, 0.1, 10.0]),
    "inner": st.sampled_from(
        [Newton(), GradientDescent(), GradientDescent(adaptive=True), LBFGS()]
    ),
    "linear": LINEAR,
}


def check_batch(
    seed: int, scale: int, wrong: bool, l2: float, inner: InnerSolver, linear: LinearSolver
) -> None:
    torch.manual_seed(seed)
    theta = torch.ones(4, requires_grad=True)
    x, query = (torch.randn(3, 9, 4) * 10.0**scale for _ in range(2))
    if wrong:
        (x if seed % 2 else query)[1, 3, 1] = WRONG[seed % 3]
    labels = (torch.arange(9) % 3).expand(3, 9)
    head = ImplicitCGHead(nn.Linear(4, 3), lr=0.1, l2=l2, inner=inner, linear=linear)
    try:
        features, query = x * theta, query * theta
        features.retain_grad()  # theta's may overflow behind it, times features of 1e25
        predictions = head.adapt_together(features, labels, steps=5)(query)
        F.cross_entropy(predictions.flatten(0, 1), labels.flatten().roll(1)).backward()
    except (FloatingPointError, ValueError, RuntimeError) as error:
        assert "expected" in str(error) and "\n" not in str(error)
        return
    assert features.grad is not None and bool(torch.isfinite(features.grad).all())


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


MANY_TOO = pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])


def hold(number: int, check: Callable[..., None], *drawn: Any, **named: Any) -> None:
    """``check`` on so many examples."""
    options = settings(
        max_examples=number, deadline=None, derandomize=True, phases=PHASES, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    options(given(*drawn, **named)(check))()


@MANY_TOO
def test_systems(number: int) -> None:
    hold(number, check_system, **SYSTEMS)


@MANY_TOO
def test_heads(number: int) -> None:
    hold(number, check_head, HEADS)


@MANY_TOO
def test_batches(number: int) -> None:
    hold(number, check_batch, **BATCHES)
