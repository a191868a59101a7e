"""Damping of the linear system: what it solves, and why iMAML on a real network needs it."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit, relative_error
from problems import EXACT, NAMES, adapt, hypergradient, make_learner, problem, truth
from torch import nn

from l2l_implicit import (
    CG,
    Direct,
    GradientDescent,
    ImplicitMAML,
    LinearSolver,
    Neumann,
)
from l2l_implicit.tasks import get_tasksets, split_support_query

from learn2learn.vision.models import CNN4Backbone  # isort: skip  (after ours)

DAMPING = 0.7
SIZE = 10  # images a class, half of them to learn from


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", NAMES)
def test_the_damped_system_is_solved(name: str) -> None:
    task = problem(name)
    _, loss = adapt(make_learner(task, linear=replace(EXACT["linear"], damping=DAMPING)), task)
    got = hypergradient(task, loss)
    assert relative_error(got, truth(name, DAMPING)) < 1e-9
    assert relative_error(got, truth(name)) > 1e-3


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "linear", [CG(3000, 1e-13, 2.0), Neumann(3000, 1e-13, damping=2.0), Direct(2.0)]
)
def test_where_the_matrix_is_indefinite(linear: LinearSolver) -> None:
    task = problem("two layers anchored", l2=0.0)
    task.theta["l2"] = torch.tensor(0.0, requires_grad=True)
    parent = make_learner(task, inner=GradientDescent(), linear=linear)
    learner, loss = adapt(parent, task, steps=2)
    phi = flat(learner.module.parameters())
    leaves = [t.detach() for t in task.leaves()]
    lowest = torch.linalg.eigvalsh(torch.func.hessian(task.inner)(phi, *leaves))[0]
    assert lowest < -1e-3
    got = hypergradient(task, loss)
    assert relative_error(got, implicit(task.inner, task.outer, task.leaves(), phi, 2.0)) < 1e-9
    assert learner.diagnostics.unsolved_linear == 0


def meta_gradients(damping: float, tasks: int = 6) -> tuple[torch.Tensor, int]:
    """Norms of the meta-gradients of as many tasks at a random CNN4, and how many were unsolved."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    sets = get_tasksets("glyphs", train_ways=5, train_samples=SIZE, test_ways=5, test_samples=SIZE)
    backbone = CNN4Backbone(hidden_size=4, channels=1)
    net = nn.Sequential(backbone, nn.Flatten(), nn.LazyLinear(5))
    net(sets.train.sample()[0])
    maml = ImplicitMAML(
        net, lr=0.1, l2=2.0, linear=CG(steps=5, damping=damping)
    )
    norms = []
    for _ in range(tasks):
        (x, y), (x_query, y_query) = split_support_query(*sets.train.sample(), shots=SIZE // 2)
        learner = maml.clone()
        learner.adapt(lambda: F.cross_entropy(learner(x), y), steps=16)  # noqa: B023
        maml.zero_grad()
        F.cross_entropy(learner(x_query), y_query).backward()
        norms.append(flat(p.grad for p in maml.parameters()).norm())
    return torch.stack(norms), maml.diagnostics.unsolved_linear


def test_a_real_network_needs_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exact, unsolved = meta_gradients(damping=0.0)
        damped, left = meta_gradients(damping=20.0)
    assert unsolved == len(exact) and left == 0
    assert exact.max() > 3 * exact.median()
    assert damped.max() < 2 * damped.median()
