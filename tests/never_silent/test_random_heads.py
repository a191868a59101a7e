"""Random linear heads, ordinary and hostile ones, against their truth; thousands are slow."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from head_problems import Problem, known, loss_of, problems, query_loss
from oracles import flat, implicit, relative_error
from random_heads import DOORS, DOUBT, MORE, Outcome, measure
from torch import Tensor
from torch.func import grad

NUMBER, LARGEST = 60, 400  # problems of each family; samples times classes of each


def as_function(problem: Problem) -> tuple[Tensor, list[Tensor]]:
    """The head's initial values in one vector, then theta: features, l2."""
    l2 = torch.tensor(problem.settings.l2, dtype=torch.float64)
    return flat(problem.head.parameters()), [problem.x, l2]


def logits(problem: Problem, phi: Tensor, x: Tensor) -> Tensor:
    ways, width = problem.settings.ways, problem.settings.width
    bias = phi[ways * width :] if problem.settings.bias else None
    return F.linear(x, phi[: ways * width].view(ways, width), bias)


def in_torchs_order(w: Tensor, width: int) -> Tensor:
    """Weights ``[d, k]``, the bias a last row, as one vector."""
    return torch.cat([w[:width].t().reshape(-1), w[width:].reshape(-1)])


def small(family: str, number: int) -> list[Problem]:
    """The first problems with few parameters, of different seeds."""
    found = [problem for seed in range(60) for problem in problems(family, seed, 1)]
    return [p for p in found if p.settings.ways * p.settings.width < 300][:number]


@pytest.mark.parametrize("family", ["ordinary", "hostile"])
def test_the_oracle_is_the_formula_with_dense_matrices(family: str) -> None:
    """To the rounding of the dense float64 Hessian, where that is well conditioned."""
    checked = 0
    for problem in small(family, 14):
        if problem.scale**2 / problem.settings.l2 > 1e5 or "huge" in problem.traits:
            continue
        settings, (truth, _) = problem.settings, known(problem)
        start, theta = as_function(problem)

        def inner(phi: Tensor, x: Tensor, l2: Tensor, a: Tensor, of: Problem = problem) -> Tensor:
            loss = loss_of(of.settings, logits(of, phi, x), of.y, of.settings.reduction)
            return loss + l2 / 2 * (phi - a).square().sum()

        def outer(phi: Tensor, x: Tensor, l2: Tensor, a: Tensor, of: Problem = problem) -> Tensor:
            return query_loss(of, logits(of, phi, of.query))

        anchor = start if settings.anchor == "init" else torch.zeros_like(start)
        w = torch.from_numpy(truth.weights.astype("float64"))
        phi = in_torchs_order(w, settings.width)
        slope = grad(inner)(phi, *theta, anchor)
        assert float(slope.norm()) < 1e-9 * settings.l2 * (1 + float(phi.norm())) + 1e-10
        features, l2, a = implicit(inner, outer, [*theta, anchor], phi)
        vector = in_torchs_order(truth.start, settings.width)
        assert relative_error([truth.features], [features]) < 1e-6, problem.name
        assert relative_error([vector], [a]) < 1e-6
        assert abs(truth.l2 - float(l2)) < 1e-6 * truth.l2_scale
        checked += 1
    assert checked > 4


Found = dict[str, list[Outcome]]
SIZES = [(NUMBER, LARGEST, DOORS), pytest.param((3000, math.inf, [*DOORS, *MORE]),
                                                marks=pytest.mark.slow)]  # fmt: skip


@pytest.fixture(scope="module", params=SIZES, ids=["few", "thousands"])
def found(request: pytest.FixtureRequest) -> Found:
    """Every door's outcome, by family; the oracle vouches for nearly all of the problems."""
    kept: Found = {}
    number, largest, doors = request.param
    for family in ("ordinary", "hostile"):
        parts = list(measure(family, number, doors, largest=largest))
        doubtful = sum(truth.doubt > DOUBT for truths, _ in parts for truth, _ in truths)
        assert doubtful <= (0 if family == "ordinary" and number == NUMBER else 0.05 * number)
        kept[family] = [outcome for _, outcomes in parts for outcome in outcomes]
    return kept


def names(outcomes: list[Outcome]) -> list[str]:
    return [f"{o.door}, {o.precision}: {o.error:.2g}, {o.name}{o.broken}" for o in outcomes]


def test_they_are_right_or_say_that_they_are_not(found: Found) -> None:
    assert not names([o for family in found.values() for o in family if o.silent])
    own = [o for o in found["ordinary"] if o.door in DOORS]
    assert not names([o for o in own if o.wrong or o.refused])


@pytest.mark.parametrize("door", DOORS)
def test_ordinary_heads_hardly_warn(found: dict[str, list[Outcome]], door: str) -> None:
    said = [o for o in found["ordinary"] if o.door == door and (o.counted or o.refused)]
    assert len({o.name for o in said}) <= 1, names(said)


def test_a_learner_warns_of_what_its_diagnostics_count(found: Found) -> None:
    """A new learner for each problem, so that each warning is its first."""
    every = [*found["ordinary"], *found["hostile"]]
    alone = [o for o in every if o.door != "together" and not o.refused]
    assert not names([o for o in alone if o.counted != o.warned])


def test_no_bound_is_below_the_error_and_the_default_has_one(found: Found) -> None:
    assert not names([o for family in found.values() for o in family if o.bound_is_low])
    assert all(o.is_bound for o in found["ordinary"] if o.door in DOORS)
