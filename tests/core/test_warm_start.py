"""A task named at ``clone`` goes on from where it ended."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from small_task import SIX_LABELS as Y
from small_task import fit
from small_task import six_inputs as x
from torch import Tensor, nn

from l2l_implicit import CG, LBFGS, ImplicitCGHead

pytestmark = pytest.mark.usefixtures("float64")
EXACT = {"inner": LBFGS(tol=1e-13), "linear": CG(steps=200, tol=1e-13)}  # no factor: v is used


def visit(parent: ImplicitCGHead, inputs: Tensor, steps: int, **key: str) -> ImplicitCGHead:
    learner = parent.clone(**key)
    learner.adapt(lambda: F.cross_entropy(learner(inputs), Y), steps=steps)
    F.cross_entropy(learner(inputs), Y.roll(1)).backward()
    return learner


@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_warm_start_continues_where_the_task_ended(anchor: str) -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True, anchor=anchor, **EXACT)
    inputs = x()
    first = visit(parent, inputs, 20, task="a")
    second = parent.clone(task="a")
    assert torch.equal(second.module.weight, first.module.weight)
    second = visit(parent, inputs, 1, task="a")
    assert second.diagnostics.cg_steps < first.diagnostics.cg_steps
    assert second.diagnostics.unsolved_inner == second.diagnostics.unsolved_linear == 0
    for other in (parent.clone(), parent.clone(task="b"), parent.clone(task=None)):
        assert torch.equal(other.module.weight, parent.module.weight)


def test_warm_start_does_not_move_the_hypergradient() -> None:
    theta, data, grads = torch.randn(4, 4, requires_grad=True), x(), []
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True, anchor="init", **EXACT)
    for _ in range(2):
        learner = parent.clone(task=7)
        h = torch.tanh(data @ theta)
        fit(learner, h, "closure", 20)
        leaves = [theta, *parent.module.parameters()]
        grads.append(torch.autograd.grad(F.cross_entropy(learner(h), Y.roll(1)), leaves))
    assert relative_error(*grads) < 1e-9


def test_no_warm_start_unless_asked_and_a_deepcopy_has_a_memory_of_its_own() -> None:
    parent, inputs = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True), x()
    twin, cold = copy.deepcopy(parent), ImplicitCGHead(nn.Linear(4, 3), 0.1)
    for visited, asked in ((parent, twin), (cold, cold)):
        visit(visited, inputs, 5, task="a")
        assert torch.equal(asked.clone(task="a").module.weight, asked.module.weight)


@pytest.mark.parametrize("tol", [1e-5, 1e-13])
def test_lbfgs_goes_on_from_next_to_the_minimum(tol: float) -> None:
    """Its first step knows no curvature; a line search that begins too long sees only rounding."""
    for seed in range(10):
        torch.manual_seed(seed)
        parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True, inner=LBFGS(tol=tol))
        inputs, norms = x(), []
        for steps in (20, 1, 1, 10):
            learner = visit(parent, inputs, steps, task="a")
            norms.append(learner.diagnostics.inner_gradient_norm)
        assert max(norms[1:]) < 2.0 * norms[0] + 1e-14 and norms[3] < 1e-4
