"""Whatever the system or the head: a hypergradient is finite, or an error says why not."""

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from small_task import adapt
from torch import Tensor, nn

from l2l_implicit import CG, LBFGS, Direct, GradientDescent, ImplicitCGHead, Neumann, Newton
from l2l_implicit.linear_solvers.solution import CONVERGED, MAX_STEPS, NOT_POSITIVE, LinearSolution

pytestmark = pytest.mark.filterwarnings("ignore")
MANY_TOO = pytest.mark.parametrize("number", [60, pytest.param(3000, marks=pytest.mark.slow)])
SEEDS = st.integers(0, 2**31)
WRONG = (math.nan, math.inf, -math.inf)
DTYPES = st.sampled_from([torch.float64, torch.float32])


def hold(number: int, check: Callable[..., None], **drawn: Any) -> None:
    """``check`` on so many examples; a seed does not shrink to anything simpler."""
    options = settings(
        max_examples=number, deadline=None, derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    options(given(**drawn)(check))()


# Symmetric systems, their entries and right-hand sides of sizes 10**scales.


def spectrum(kind: str, n: int) -> Tensor:
    """Eigenvalues of a random matrix of this kind."""
    values = torch.logspace(0, -float(torch.randint(0, 8, ())), n).double()
    if kind == "singular":
        values[n // 2 :] = 0.0
    if kind == "indefinite":
        values[::2] *= -1.0
    return values * (kind != "zero")


def check_system(
    seed: int, kind: str, size: int, scales: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    values = spectrum(kind, size)
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q
    a = (q * values) @ q.t() * 10.0 ** scales[0]
    b = torch.randn(size).double() * 10.0 ** scales[1] * (kind != "zero b")
    if kind == "not finite":
        [a[0], b][seed % 2][0] = WRONG[seed % 3]
    a, b = ((a + a.t()) / 2).to(dtype), b.to(dtype)
    clean = bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    conditioned = float(values.abs().max()) < 1e4 * float(values.abs().min())
    together = torch.stack([b, -b, torch.zeros_like(b)])
    warm, steps = torch.full_like(together, 1e3), 3 * size
    for solver, start in ((CG(steps), None), (CG(steps), warm), (Direct(), None),
                          (Neumann(steps), None)):  # fmt: skip
        answer = solver.solve(lambda p: p @ a, together, start)
        assert bool(torch.isfinite(answer.solution).all()), (solver, answer)
        assert not bool(answer.relative_residual.isnan().any()), (solver, answer)
        if answer.reason[0] == CONVERGED:
            assert clean or isinstance(solver, Neumann), (solver, answer)
            if dtype == torch.float64 and conditioned:  # by the true residual, not the recursion's
                residual = (b - a @ answer.solution[0]).abs().max()
                assert float(residual) <= 1e-3 * float(b.abs().max()), (solver, answer)
        plain = isinstance(solver, CG) and start is None and max(map(abs, scales)) <= 6
        if plain and clean and bool(b.any()):
            check_truthful(solver, a.double(), b.double(), answer, torch.finfo(dtype).eps)


def check_truthful(solver: CG, a: Tensor, b: Tensor, answer: LinearSolution, eps: float) -> None:
    """The residual is the one that is said, and no solution is worse than none."""
    v, said = answer.solution[0].double(), float(answer.relative_residual[0] * b.norm())
    assert answer.reason[0] in (CONVERGED, MAX_STEPS, NOT_POSITIVE), (solver, answer)
    assert int(answer.steps[0]) <= solver.steps
    true, rounding = float((b - a @ v).norm()), 50 * eps * float(b.norm() + a.norm() * v.norm())
    assert abs(true - said) <= rounding + 1e-6 * said, (solver, answer)
    assert float(v @ (a @ v) / 2 - b @ v) <= 50 * eps * float(b.norm() * v.norm()), (solver, answer)
    if answer.reason[0] == CONVERGED:
        assert true <= solver.tol * (1 + 1e-6) * float(b.norm()) + rounding, (solver, answer)
    else:
        assert float(answer.relative_residual[0]) > solver.tol, (solver, answer)


@MANY_TOO
def test_systems(number: int) -> None:
    kinds = ["definite", "singular", "indefinite", "zero", "zero b", "not finite"]
    exponents = st.integers(-30, 30)
    hold(number, check_system, seed=SEEDS, kind=st.sampled_from(kinds), size=st.integers(1, 12),
         scales=st.tuples(exponents, exponents), dtype=DTYPES)  # fmt: skip


# Few-shot heads.

FEW = st.integers(1, 30)
OPTIONS = st.fixed_dictionaries({
    "lr": st.sampled_from([1e-6, 0.1, 1.0, 1e6]),
    "l2": st.sampled_from([0.0, 1e-8, 0.1, 10.0, 1e20]),
    "anchor": st.sampled_from(["zero", "init"]),
    "inner": st.one_of(st.builds(Newton, cg_steps=FEW), st.just(LBFGS()),
                       st.builds(GradientDescent, adaptive=st.booleans())),
    "linear": st.one_of(st.builds(CG, steps=FEW), st.builds(Neumann, steps=FEW),
                        st.just(Direct())),
})  # fmt: skip


def check_head(
    seed: int, how: str, net: str, scale: int, query_scale: int, wrong: bool, dtype: torch.dtype,
    options: dict[str, Any], steps: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    theta = torch.ones(4, dtype=dtype, requires_grad=True)
    x = torch.randn(3, 9, 4, dtype=dtype) * 10.0**scale
    query = torch.randn(3, 9, 4, dtype=dtype) * 10.0**query_scale
    if wrong:
        (x if seed % 2 else query)[0, 3, 1] = (*WRONG, 3e38)[seed // 2 % 4]
    labels = torch.arange(9) % 3
    head = nn.Linear(4, 3, bias=net != "no bias")
    if net == "two layers" and how != "together":
        head = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    parent = ImplicitCGHead(head.to(dtype), **options)
    learner = parent.clone()
    try:
        h, h_query = x * theta, query * theta
        h.retain_grad()  # theta's may overflow behind it, times features of 1e25
        if how == "together":
            outputs = parent.adapt_together(h, labels.expand(3, 9), steps)(h_query)
        else:
            adapt(learner, lambda: F.cross_entropy(learner(h[0]), labels), how, steps)
            outputs = learner(h_query[0])
        outputs = outputs.reshape(-1, 3)
        F.cross_entropy(outputs, labels.roll(1).repeat(len(outputs) // 9)).backward()
    except (FloatingPointError, ValueError, RuntimeError) as error:
        assert "expected" in str(error) and "\n" not in str(error)
        return
    gradients = [h.grad, *(p.grad for p in learner.module.parameters() if p.is_leaf)]
    found = [g for g in gradients if g is not None]
    assert found and all(bool(torch.isfinite(g).all()) for g in found)


@MANY_TOO
@pytest.mark.parametrize("how", ["closure", "loss", "together"])
def test_heads(number: int, how: str) -> None:
    hold(number, lambda **drawn: check_head(how=how, **drawn), seed=SEEDS,
         net=st.sampled_from(["linear", "two layers", "no bias"]), scale=st.integers(-25, 25),
         query_scale=st.integers(-25, 25), wrong=st.sampled_from([False, False, False, True]),
         dtype=DTYPES, options=OPTIONS, steps=st.integers(1, 15))  # fmt: skip
