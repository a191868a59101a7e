"""The hypergradient against oracles that share no code with it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, implicit, minimize, relative_error, ridge, unrolled
from problems import NAMES, adapt, hypergradient, linear, make_learner, problem
from torch import nn

from l2l_implicit import ImplicitCGHead

pytestmark = pytest.mark.usefixtures("float64")

STEPS = {"newton": 30, "gradient": 200}


def solved(task):
    """The oracle's inner minimum."""
    return minimize(task.inner, task.start(), task.leaves(), task.lr)


def expected(task):
    return implicit(task.inner, task.outer, task.leaves(), solved(task))


@pytest.mark.parametrize("name", NAMES)
def test_implicit_unrolled_and_finite_differences_meet(name: str) -> None:
    task = problem(name)
    leaves, phi = task.leaves(), solved(task)
    dense = implicit(task.inner, task.outer, leaves, phi)
    _, loss = adapt(make_learner(task), task)
    got = hypergradient(task, loss)
    assert relative_error(got, dense) < 1e-9
    long_way = unrolled(task.inner, task.outer, leaves, task.start(), task.lr, STEPS["gradient"])
    assert relative_error(got, long_way) < 1e-6
    for _ in range(2):
        direction = [torch.randn_like(t) for t in leaves]
        slope = finite_difference(task.inner, task.outer, leaves, direction, phi)
        along = sum(float((g * d).sum()) for g, d in zip(got, direction, strict=True))
        scale = sum(float(g.square().sum()) for g in got) ** 0.5
        assert abs(slope - along) < 1e-6 * max(abs(slope), scale)


@pytest.mark.parametrize("how", ["loss", "closure"])
@pytest.mark.parametrize("step", ["newton", "gradient"])
@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_adapting(name: str, step: str, how: str) -> None:
    task = problem(name)
    _, loss = adapt(make_learner(task, step=step), task, how, STEPS[step])
    assert relative_error(hypergradient(task, loss), expected(task)) < 1e-8
