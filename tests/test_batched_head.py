"""T linear heads at once give the numbers of a loop over tasks, and of the dense oracle."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batched_tasks import (
    CLASSES,
    EXACT,
    LOSS,
    SUPPORT,
    TASKS,
    WIDTH,
    Batch,
    weights,
)
from oracles import implicit, minimize, relative_error
from torch import Tensor, nn
from torch.func import functional_call

from l2l_implicit import ImplicitCGHead, ImplicitMAML, UnsolvedWarning
from l2l_implicit.batched import BatchedImplicitHead
from l2l_implicit.batched.objective import LinearObjective

pytestmark = pytest.mark.usefixtures("float64")

ROUNDING, SOLVED = 1e-12, 1e-8


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_steps_equal_the_loop_to_rounding(
    loss: str, bias: bool, anchor: str, reduction: str
) -> None:
    """Also where neither the inner problem nor the linear system is solved."""
    batch = Batch(loss, bias)
    settings: dict[str, Any] = dict(step="gradient", anchor=anchor, cg_steps=4, cg_tol=1e-3)
    settings["reduction"] = reduction
    with pytest.warns(UnsolvedWarning):
        expected, learners = batch.looped(steps=5, **settings)
        got, adapted = batch.batched(steps=5, linear_solver="cg", **settings)
        adapted.diagnostics.tasks()
    assert relative_error([adapted.weight], [weights(learners)]) < ROUNDING
    for ours, theirs in zip(got, expected, strict=True):
        if theirs.abs().max() == 0:
            assert torch.equal(ours, theirs)
        else:
            assert relative_error([ours], [theirs]) < ROUNDING
    for ours, learner in zip(adapted.diagnostics.tasks(), learners, strict=True):
        theirs = learner.diagnostics
        assert (ours.cg_steps, ours.cg_reason) == (theirs.cg_steps, theirs.cg_reason)
        assert ours.inner_steps == theirs.inner_steps == 5
        assert ours.cg_residual == pytest.approx(theirs.cg_residual, rel=1e-9)
        assert ours.inner_residual == pytest.approx(theirs.inner_residual, rel=1e-9)
        assert ours.unsolved_inner == theirs.unsolved_inner
        assert ours.unsolved_linear == theirs.unsolved_linear


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("linear_solver", ["direct", "cg"])
def test_newton_equals_the_loop(loss: str, bias: bool, anchor: str, linear_solver: str) -> None:
    batch = Batch(loss, bias)
    looped, learners = batch.looped(steps=30, anchor=anchor, **EXACT)
    got, adapted = batch.batched(steps=30, anchor=anchor, linear_solver=linear_solver, **EXACT)
    assert relative_error([adapted.weight], [weights(learners)]) < SOLVED
    assert relative_error(got, looped) < SOLVED
    assert bool((adapted.diagnostics.inner_residual < 1e-9).all())
    assert bool((adapted.diagnostics.cg_residual < 1e-10).all())


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_newton_equals_the_dense_oracle(loss: str, anchor: str) -> None:
    batch = Batch(loss)
    expected = dense_hypergradient(batch, anchor)
    for solver in ("direct", "cg"):
        got, _ = batch.batched(steps=30, anchor=anchor, linear_solver=solver, **EXACT)
        assert relative_error(got, expected) < SOLVED


def dense_hypergradient(batch: Batch, anchor: str) -> list[Tensor]:
    """The implicit function theorem with dense matrices, task by task."""
    shapes = {name: p.shape for name, p in batch.head.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(phi: Tensor, features: Tensor, y: Tensor) -> Tensor:
        pieces = phi.split(sizes)
        named = {name: p.view(s) for (name, s), p in zip(shapes.items(), pieces, strict=True)}
        return batch.loss(functional_call(batch.head, named, (features,)), y)

    total = [torch.zeros_like(leaf) for leaf in batch.leaves()]
    start = torch.cat([p.detach().reshape(-1) for p in batch.head.parameters()])
    for images, y in zip(batch.images, batch.targets, strict=True):

        def inner(phi: Tensor, *theta: Tensor, images=images, y=y) -> Tensor:
            backbone, l2, *initial = theta
            center = torch.cat([p.reshape(-1) for p in initial]) if anchor == "init" else 0.0
            value = loss(phi, torch.tanh(images[:SUPPORT] @ backbone), y[:SUPPORT])
            return value + 0.5 * l2 * (phi - center).square().sum()

        def outer(phi: Tensor, *theta: Tensor, images=images, y=y) -> Tensor:
            return loss(phi, torch.tanh(images[SUPPORT:] @ theta[0]), y[SUPPORT:])

        theta = batch.leaves()
        phi = minimize(inner, start, theta, lr=0.2)
        for sum_, part in zip(total, implicit(inner, outer, theta, phi), strict=True):
            sum_ += part / TASKS
    return total


def test_tasks_of_unequal_difficulty_stop_by_themselves() -> None:
    """One task solved at its start, one with a right-hand side of zero, the others as they are."""
    batch = Batch("squared_error")
    batch.targets[0] = 0.0
    nn.init.zeros_(batch.head.weight)
    nn.init.zeros_(batch.head.bias)
    looped, learners = batch.looped(steps=30, **EXACT)
    for solver in ("cg", "direct"):
        got, adapted = batch.batched(steps=30, linear_solver=solver, **EXACT)
        assert relative_error(got, looped) < SOLVED
        tasks = adapted.diagnostics.tasks()
        assert tasks[0].inner_steps == 0 < tasks[1].inner_steps
        assert tasks[0].cg_reason == "right-hand side is zero"
        assert tasks[1].cg_reason == "converged"


def test_more_examples_than_features_and_the_reverse() -> None:
    for width in (2, 40):
        head, y = nn.Linear(width, CLASSES), torch.randint(CLASSES, (TASKS, SUPPORT))
        features = torch.randn(TASKS, SUPPORT, width)
        adapted = BatchedImplicitHead(head, 0.1, cg_tol=1e-12)(features, y)
        for x, labels, weight in zip(features, y, adapted.weight, strict=True):
            learner = ImplicitCGHead(head, 0.1, **EXACT).clone()
            learner.adapt(lambda n=learner, x=x, y=labels: F.cross_entropy(n(x), y), steps=30)
            assert relative_error([weight], [learner.module.weight]) < SOLVED


def test_damped_newton_from_a_far_start() -> None:
    """A plain Newton step overshoots there; the line search does not."""
    batch = Batch()
    with torch.no_grad():
        batch.head.weight.mul_(50.0)
    looped, _ = batch.looped(steps=60, anchor="init", **EXACT)
    got, adapted = batch.batched(steps=60, anchor="init", **EXACT)
    assert bool((adapted.diagnostics.inner_residual < 1e-9).all())
    assert relative_error(got, looped) < SOLVED


def test_like_shares_head_settings_and_diagnostics() -> None:
    batch = Batch()
    parent = ImplicitCGHead(batch.head, 0.4, l2=batch.l2, anchor="init", cg_tol=1e-6)
    head = BatchedImplicitHead.like(parent, steps=15, loss="cross_entropy")
    assert head.module is parent.module and head.l2 is batch.l2 and head.cg_tol == 1e-6
    assert dict(head.named_parameters()).keys() == dict(parent.named_parameters()).keys()
    features = batch.features()
    adapted = head(features[:, :SUPPORT], batch.targets[:, :SUPPORT])
    adapted(features[:, SUPPORT:]).square().sum().backward()
    assert parent.diagnostics.hypergradients == 0
    adapted.diagnostics.tasks()
    assert len(adapted.diagnostics.tasks()) == TASKS  # read twice, counted once
    assert parent.diagnostics.hypergradients == TASKS
    with pytest.raises(TypeError, match="got ImplicitMAML"):
        BatchedImplicitHead.like(ImplicitMAML(batch.head, 0.4))


ALONE: list[tuple[dict[str, Any], str]] = [
    ({"warm_start": True}, "got warm_start"),
    ({"first_order": True}, "got first_order"),
    ({"step": lambda at: at.point}, "got a step of your own"),
    ({"lr": "auto", "step": "gradient"}, "got lr='auto'"),
    ({"stop_tol": 0.1, "step": "gradient"}, "got stop_tol"),
    ({"solver": "neumann"}, "got solver='neumann'"),
    ({"damping": 0.1}, "got damping"),
]


@pytest.mark.parametrize(("settings", "message"), ALONE)
def test_what_only_a_loop_can_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchedImplicitHead.like(ImplicitCGHead(nn.Linear(7, 3), **{"lr": 0.1, **settings}))


def test_other_solvers_of_the_head_find_the_same_minimum() -> None:
    batch = Batch()
    settings: dict[str, Any] = dict(EXACT, step="lbfgs", solver="direct", stop_tol=1e-12)
    parent = ImplicitCGHead(batch.head, "auto", l2=batch.l2, **settings)
    head = BatchedImplicitHead.like(parent, steps=30)
    assert head.linear_solver == "direct" and head.stop_tol == 1e-12
    got, _ = batch.run(head)
    expected, _ = batch.looped(steps=30, **EXACT)
    assert relative_error(got, expected) < SOLVED


def test_nothing_is_kept_without_gradients() -> None:
    batch = Batch()
    head = BatchedImplicitHead(batch.head, 0.4)
    with torch.no_grad():
        features = batch.features()
        adapted = head(features[:, :SUPPORT], batch.targets[:, :SUPPORT])
        assert not adapted(features[:, SUPPORT:]).requires_grad


def test_no_second_derivative() -> None:
    batch = Batch()
    features = batch.features()
    adapted = BatchedImplicitHead(batch.head, 0.4)(features, batch.targets)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(adapted(features).sum(), batch.backbone, create_graph=True)


def test_no_regulariser_is_solved_by_conjugate_gradient() -> None:
    batch = Batch("squared_error")
    batch.l2 = 0.0
    head = BatchedImplicitHead(batch.head, 0.4, l2=0.0, loss="squared_error", **EXACT)
    features = torch.randn(TASKS, 20, 3)
    head.module = nn.Linear(3, CLASSES)
    y = torch.randn(TASKS, 20, CLASSES)
    adapted = head(features, y)
    ones = torch.cat([features, torch.ones(TASKS, 20, 1)], 2)
    expected = torch.linalg.lstsq(ones, y).solution[:, :3].transpose(1, 2)
    assert relative_error([adapted.weight], [expected]) < SOLVED


def test_one_output_takes_targets_without_an_axis() -> None:
    head, x = BatchedImplicitHead(nn.Linear(7, 1), 0.1, loss="squared_error"), torch.randn(2, 8, 7)
    y = torch.randn(2, 8)
    assert torch.equal(head(x, y).weight, head(x, y.unsqueeze(2)).weight)


def test_copies_are_independent() -> None:
    head = BatchedImplicitHead(nn.Linear(7, 3), 0.1)
    twin = copy.deepcopy(head)
    assert twin.module is not head.module and twin.diagnostics is not head.diagnostics


def test_objective_gradient_is_autograds() -> None:
    """The closed form against autograd on the loss itself."""
    batch = Batch("squared_error")
    head = BatchedImplicitHead(batch.head, 0.4, loss="squared_error")
    x = batch.features().detach()
    loss = head._support_loss(batch.targets, x)
    objective = LinearObjective(x, loss, batch.l2.detach(), None, bias=True)
    phi = torch.randn(TASKS, WIDTH * CLASSES + CLASSES).requires_grad_()
    value = loss.value(objective.logits(phi)) + 0.1 * phi.square().sum(1)
    (expected,) = torch.autograd.grad(value.sum(), phi)
    got = objective.gradient(phi.detach(), objective.logits(phi.detach()))
    assert relative_error([got], [expected]) < 1e-14


def test_a_system_beyond_float32_is_reported_and_no_worse_than_no_answer() -> None:
    """The largest curvature is 1e13 times l2: rounding leaves nothing of the matrix's shift."""
    torch.set_default_dtype(torch.float32)
    settings: dict[str, Any] = dict(l2=1e-6, loss="squared_error", inner_tol=10.0)
    head = BatchedImplicitHead(nn.Linear(WIDTH, CLASSES), 1e-9, **settings)
    x = 1e4 * torch.randn(2, SUPPORT, WIDTH)
    adapted = head(x.requires_grad_(), torch.randn(2, SUPPORT, CLASSES))
    with pytest.warns(UnsolvedWarning, match="the linear system is not solved"):
        adapted(torch.randn(2, SUPPORT, WIDTH)).square().sum().backward()
        tasks = adapted.diagnostics.tasks()
    assert bool(x.grad.isfinite().all())
    for task in tasks:
        assert task.cg_reason == "direct solve ended by rounding" and task.unsolved_linear == 1
        assert 0.1 < task.cg_residual <= 1.0
