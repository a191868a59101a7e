"""T linear heads adapted together give each task's own numbers, whatever the method."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import count_operations, peak_of_live_tensors, relative_error
from several_tasks import CLASSES, LOSS, SUPPORT, TASKS, WIDTH, Batch, assert_alike, assert_same
from small_task import FLOAT64, UNSOLVED_OR_NOT
from torch import Tensor, nn
from torch.nn.utils import prune

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GradientDescent,
    ImplicitCGHead,
    ImplicitGBML,
    LinearSolution,
    Neumann,
    Newton,
    UnsolvedWarning,
)
from l2l_implicit.linear_solvers import solution as reasons

pytestmark = [FLOAT64, UNSOLVED_OR_NOT]


class HalfSteps:
    """An inner solver of one's own: three halves of a gradient step, and an end."""

    def begin(self, lr: float) -> Any:
        taken = itertools.count()
        return lambda at: at.point - 0.5 * lr * (next(taken) < 3) * at.gradient


class Richardson:
    """A linear solver of one's own."""

    damping = 0.1

    def solve(self, hvp: Any, b: Tensor, start: Tensor | None = None) -> LinearSolution:
        v = torch.zeros_like(b)
        for _ in range(25):
            v = v + 0.3 * (b - hvp(v))
        residual = (b - hvp(v)).norm(dim=1) / b.norm(dim=1).clamp_min(1e-300)
        return LinearSolution(v, torch.full((len(b),), 25), residual, ["my own"] * len(b))


INNER = {
    "newton": Newton(),
    "gradient": GradientDescent(),
    "adaptive": GradientDescent(adaptive=True),
    "gradient tol": GradientDescent(tol=0.3),
    "lbfgs": LBFGS(history=4, tol=1e-3),
    "own": HalfSteps(),
}
LINEAR = {  # few steps: what rounding makes of T systems in place of one grows with each
    "cg": CG(steps=4, tol=0.1),
    "cg few": CG(steps=3, tol=1e-9),
    "cg damped": CG(steps=4, tol=0.1, damping=0.3),
    "neumann": Neumann(steps=30),
    "neumann step": Neumann(steps=9, step_size=0.2, damping=0.2),
    "direct": Direct(),
    "direct damped": Direct(damping=0.3),
    "own": Richardson(),
}


KINDS = [
    ("cross-entropy", True, "mean", "zero"), ("cross-entropy", False, "sum", "init"),
    ("squared error", True, "mean", "init"), ("squared error", False, "sum", "zero"),
]  # fmt: skip


@pytest.mark.parametrize("loss, bias, reduction, anchor", KINDS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("linear", LINEAR)
def test_each_task_has_its_own_numbers(
    loss: str, bias: bool, reduction: str, anchor: str, inner: str, linear: str
) -> None:
    """Also where neither the inner problem nor the linear system is solved."""
    solvers = {"inner": INNER[inner], "linear": LINEAR[linear]}
    assert_alike(Batch(loss, bias), 5, **solvers, reduction=reduction, anchor=anchor)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSS)
def test_conjugate_gradient_together_is_as_right_as_alone(loss: str, reduction: str) -> None:
    """Its steps magnify rounding, which may differ for T systems, up to what it has left unsolved:
    as the diagnostics bound it, for phi at its minimum."""
    batch, settings = Batch(loss), {"inner": LBFGS(tol=1e-12), "linear": CG()}
    learner = batch.learner(reduction=reduction, **settings)
    alone, together = batch.alone(learner, 200), batch.together(learner, 200)
    said = max(task.hypergradient_error for one in (alone, together) for task in one[2])
    assert 1e-10 < said < 0.05
    assert relative_error(alone[1], together[1]) < said


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("linear", ["cg", "neumann", "direct"])
def test_without_a_regulariser(inner: str, linear: str) -> None:
    """No bound and no factor: the general solvers, and an estimate of the error."""
    solvers = {"inner": INNER[inner], "linear": LINEAR[linear]}
    tasks = assert_alike(Batch("squared error"), 5, 1e-9, l2=0.0, **solvers)
    assert not any(task.is_bound for task in tasks)


def test_a_second_batch_has_numbers_of_its_own() -> None:
    """Nothing of one call is left in the learner for the next."""
    batch = Batch()
    for inner in INNER.values():
        learner = batch.learner(inner=inner)
        first = batch.together(learner, steps=4)
        assert_same(batch.together(learner, steps=4), first, tol=1e-15)


# Tasks that end for different reasons.


def mixed_batch(loss: str) -> Batch:
    """Ordinary; solved at its start; hard; no features; one class; no gradient of the query."""
    batch = Batch(loss, tasks=6)
    batch.feature_scales[2], batch.feature_scales[3] = 40.0, 0.0
    if loss == "squared error":
        batch.targets[1] = 0.0  # with a head of zeros
        batch.targets[4] = 1.0
    else:
        batch.targets[4] = 1
    batch.query_weights[5] = 0.0
    for parameter in batch.head.parameters():
        nn.init.zeros_(parameter)
    return batch


@pytest.mark.parametrize("loss", LOSS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("linear", LINEAR)
def test_tasks_that_end_for_different_reasons(loss: str, inner: str, linear: str) -> None:
    batch = mixed_batch(loss)
    if inner in ("gradient", "gradient tol", "own") or linear == "own":
        batch.feature_scales[2] = 3.0  # a fixed step diverges on harder ones
    # Each reason at its own task; rounding decides the last digits of the hard one.
    tasks = assert_alike(batch, 6, 1e-9, inner=INNER[inner], linear=LINEAR[linear])
    assert linear == "own" or tasks[5].cg_reason == reasons.ZERO


def test_diagnostics_are_each_tasks_and_the_parent_counts_them_all() -> None:
    batch = Batch()
    learner = batch.learner(inner=GradientDescent())
    with pytest.warns(UnsolvedWarning, match="the inner problem is not solved"):
        _, _, tasks = batch.together(learner, steps=3)
    assert [task.hypergradients for task in tasks] == [1] * TASKS
    assert len({task.inner_gradient_norm for task in tasks}) == TASKS
    counted = sum(task.unsolved for task in tasks)
    assert learner.diagnostics.unsolved == counted > 0
    assert learner.diagnostics.hypergradients == TASKS
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        batch.together(learner, steps=3)
    assert learner.diagnostics.hypergradients == 2 * TASKS


def test_targets_choose_the_loss() -> None:
    """Without `loss=`: classes for the cross-entropy, numbers for the squared error; both means."""
    for name in LOSS:
        batch = Batch(name)
        expected = batch.together(batch.learner(), steps=1)
        assert_same(batch.together(batch.learner(loss=None), steps=1), expected, tol=1e-15)
    y, one = torch.randn(2, 8), ImplicitCGHead(nn.Linear(7, 1), 0.1)
    found = [one.adapt_together(X + 1, t).weight for t in (y, y.unsqueeze(2))]
    assert torch.equal(*found)  # one output takes targets without an axis


def test_nothing_is_kept_without_gradients() -> None:
    batch = Batch()
    for inner in INNER.values():
        with torch.no_grad():
            features = batch.features()
            adapted = batch.learner(inner=inner).adapt_together(
                features[:, :SUPPORT], batch.targets[:, :SUPPORT], 5
            )
            assert not adapted(features[:, SUPPORT:]).requires_grad
        phi, _, said = batch.together(batch.learner(inner=inner), steps=5)
        assert torch.equal(adapted.weight.flatten(1), phi[:, : CLASSES * WIDTH])
        for mine, other in zip(adapted.diagnostics, said, strict=True):
            assert mine.inner_gradient_norm == other.inner_gradient_norm
            assert math.isnan(mine.hypergradient_error) and mine.unsolved == 0


def test_no_second_derivative() -> None:
    batch = Batch()
    features = batch.features()
    adapted = batch.learner().adapt_together(features, batch.targets)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(adapted(features).sum(), batch.backbone, create_graph=True)


def test_memory_does_not_depend_on_the_steps_and_grows_with_the_tasks_only() -> None:
    def peak(tasks: int, steps: int) -> int:
        x = torch.randn(tasks, 10, 64, requires_grad=True)
        y = torch.randint(CLASSES, (tasks, 10))
        learner = ImplicitCGHead(nn.Linear(64, CLASSES), 0.1, inner=GradientDescent())

        def run() -> None:
            adapted = learner.adapt_together(x, y, steps)
            F.cross_entropy(adapted(x).flatten(0, 1), y.flatten()).backward()

        run()
        return peak_of_live_tensors(run)

    few = peak(4, 5)
    assert peak(4, 400) <= 1.01 * few
    assert peak(16, 5) <= 4.5 * few


# What a GPU needs: few operations, no other device.


@pytest.mark.parametrize("inner, linear", [
    (Newton(), CG()), (Newton(), Neumann(30)), (GradientDescent(), CG()),
])  # fmt: skip
def test_the_number_of_operations_does_not_grow_with_the_tasks(inner: Any, linear: Any) -> None:
    """Copies of one task, which take equally many steps; what `Direct` factors is one by one."""
    counts, x1, y1 = [], torch.randn(1, 6, WIDTH), torch.arange(6).view(1, 6) % CLASSES
    for tasks in (2, 16):
        x, y = x1.repeat(tasks, 1, 1), y1.repeat(tasks, 1)
        head = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, inner=inner, linear=linear)

        def run(head=head, x=x, y=y) -> None:  # type: ignore[no-untyped-def]
            leaf = x.clone().requires_grad_()
            adapted = head.adapt_together(leaf, y, 3)
            F.cross_entropy(adapted(leaf).flatten(0, 1), y.flatten()).backward()

        run()
        counts.append(count_operations(run))
    assert abs(counts[1] - counts[0]) <= 0.02 * counts[0]


@pytest.mark.parametrize("inner", ["newton", "gradient", "adaptive", "lbfgs"])
@pytest.mark.parametrize("linear", ["cg", "neumann", "direct"])
@pytest.mark.parametrize("together", [True, False], ids=["together", "alone"])
def test_nothing_is_made_on_another_device(inner: str, linear: str, together: bool) -> None:
    """A device for new tensors that holds no numbers: what is made without one would be lost."""
    batch = Batch()
    learner = batch.learner(inner=INNER[inner], linear=LINEAR[linear])
    run = batch.together if together else batch.alone
    expected = run(learner, 4)
    with torch.device("meta"):
        found = run(learner, 4)
    assert_same(found, expected, tol=1e-15)


def head(**settings: Any) -> ImplicitCGHead:
    return ImplicitCGHead(nn.Linear(7, 3), 0.1, **settings)


def frozen() -> ImplicitCGHead:
    learner = head(allow_nograd=True)
    learner.module.bias.requires_grad_(False)
    return learner


def changed(place: str, value: Any = torch.zeros_like) -> ImplicitCGHead:
    """With something of its own on the object itself."""
    learner = head()
    setattr(learner, place, value)
    return learner


def hooked(name: str) -> ImplicitCGHead:
    """Of a layer that computes something else than a linear layer does."""
    learner = head()
    layer = learner.module
    if name == "pruned":
        prune.random_unstructured(layer, "weight", amount=0.5)
    elif name == "learner's":
        learner.register_forward_hook(lambda learner, given, output: 2.0 * output)
    elif name == "forward":
        layer.forward = lambda x: 2.0 * F.linear(x, layer.weight, layer.bias)
    else:
        getattr(layer, name)(lambda layer, given, *output: (output or given)[0] * 2.0)
    return learner


class Scaled(ImplicitCGHead):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2.0 * x)


class Focal(nn.CrossEntropyLoss):
    def forward(self, given: Tensor, target: Tensor) -> Tensor:
        each = F.cross_entropy(given, target, reduction="none")
        return ((1.0 - (-each).exp()) * each).mean()


X = torch.zeros(2, 8, 7)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(8, 7)}, ValueError, r"features: expected shape \[T, m, 7\]"),
    ({"features": torch.zeros(0, 8, 7)}, ValueError, r"got \[0, 8, 7\]"),
    ({"features": X.long()}, TypeError, "expected floats"),
    ({"features": [1.0]}, TypeError, "expected tensors, got list, Tensor; stack the tasks"),
    ({"query": [1.0]}, TypeError, "query: expected a tensor, got list; stack the tasks"),
    ({"features": X.to("meta")}, ValueError, "expected one device"),
    ({"targets": torch.zeros(2, 7).long()}, ValueError, r"targets: .* of shape \[2, 8\]"),
    ({"targets": torch.zeros(2, 8)}, ValueError, r"expected floats of shape \[2, 8, 3\]"),
    ({"targets": torch.zeros(2, 8).bool()}, ValueError, "expected classes .* got torch.bool"),
    ({"targets": torch.full((2, 8), 3)}, ValueError, "expected classes 0 to 2, got 3 to 3"),
    ({"features": X * torch.nan}, FloatingPointError, r"in tasks \[0, 1\]"),
    ({"steps": 0}, ValueError, r"steps \(K\): expected at least 1"),
    ({"query": torch.zeros(3, 5, 7)}, ValueError, r"query: expected shape \[2, q, 7\]"),
    ({"head": lambda: ImplicitCGHead(nn.Sequential(nn.Linear(7, 3)), 0.1)}, TypeError,
     "got one of Sequential"),
    ({"head": lambda: head(warm_start=True)}, ValueError, "got warm_start=True"),
    ({"head": lambda: head(first_order=True)}, ValueError, "got first_order"),
    ({"head": lambda: ImplicitGBML(nn.Linear(7, 3), lambda parameter: None)}, ValueError,
     "got a regularizer of its own"),
    ({"head": frozen}, ValueError, "got frozen parameters; a"),
    *(({"head": lambda loss=loss: head(loss=loss)}, ValueError,
       "loss: expected nn.CrossEntropyLoss") for loss in (
        nn.CrossEntropyLoss(weight=torch.ones(3)), nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(reduction="none"), nn.L1Loss(), nn.NLLLoss(), Focal())),
    ({"head": lambda: changed("loss", nn.L1Loss())}, ValueError, "loss: expected nn.CrossEntropy"),
    *(({"head": lambda name=name: hooked(name)}, ValueError, "got hooks")
      for name in ("pruned", "register_forward_hook", "register_forward_pre_hook",
                   "register_full_backward_hook", "register_full_backward_pre_hook", "learner's")),
    ({"head": lambda: hooked("forward")}, ValueError, r"got a forward\(\) of its own"),
    ({"head": lambda: Scaled(nn.Linear(7, 3), 0.1)}, ValueError, r"got a forward\(\) of its own"),
    ({"head": lambda: changed("forward")}, ValueError, r"got a forward\(\) of its own"),
    ({"head": lambda: changed("regularizer")}, ValueError, "got a regularizer of its own"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"features": X, "targets": torch.zeros(2, 8).long(), "query": X, "steps": 5}
    given = {"head": head, **good, **wrong}
    with pytest.raises(error, match=message) as caught:
        learner = given["head"]()
        adapted = learner.adapt_together(given["features"], given["targets"], given["steps"])
        adapted(given["query"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("solvers", [{}, {"inner": GradientDescent(), "linear": Direct()}])
def test_one_bad_task_is_named(solvers: dict[str, Any]) -> None:
    """In what is given, and in what the query loss makes of it."""
    learner, y = head(**solvers), torch.arange(16).view(2, 8) % 3
    features = torch.randn(2, 8, 7).requires_grad_()
    adapted = learner.adapt_together(features, y)
    scale = torch.tensor([1.0, torch.inf]).view(2, 1, 1)
    with pytest.raises(FloatingPointError, match=r"linear system of tasks \[1\]"):
        (adapted(features) * scale).sum().backward()
    numbers, spoilt = torch.randn(2, 8, 3), features.detach().clone()
    numbers[1, 4, 1], spoilt[1, 0, 0] = torch.nan, torch.inf
    for bad in ((spoilt, y), (features, numbers)):
        with pytest.raises(FloatingPointError, match=r"in tasks \[1\]"):
            learner.adapt_together(*bad)
