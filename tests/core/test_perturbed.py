"""The hypergradient by a perturbed inner problem, against oracles with second derivatives."""

import gc
import math
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, relative_error
from problems import NAMES, adapt, hypergradient, make_learner, problem, truth
from small_task import Made, Y, network, x
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    LBFGS,
    Diagnostics,
    GradientDescent,
    ImplicitCGHead,
    ImplicitGBML,
    ImplicitMAML,
    Newton,
    Perturbed,
    UnsolvedWarning,
)
from l2l_implicit.linear_solvers.solution import INEXACT, MAX_STEPS

import learn2learn as l2l  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = pytest.mark.usefixtures("float64")
INNER = LBFGS(tol=1e-12)
CLOSE = Perturbed(tol=1e-8)
EXACT = {"inner": Newton(100, 1e-12), "linear": CG(200, 1e-12)}
WITHOUT = {"inner": INNER, "linear": CLOSE}


# Against the implicit function theorem with dense matrices.


def solved(
    name: str, linear: Any = CLOSE, inner: Any = INNER, how: str = "closure", steps: int = 100,
    damping: float = 0.0, cached: bool = True,
) -> tuple[float, Diagnostics]:  # fmt: skip
    """The error of a problem's hypergradient, and what is said of it."""
    task = problem(name)
    parent = make_learner(task, inner=inner, linear=linear)
    learner, loss = adapt(parent, task, how, steps, cached)
    return relative_error(hypergradient(task, loss), truth(name, damping)), learner.diagnostics


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_theta(name: str) -> None:
    """The error is no more than what is said of it; that is an estimate, hence the factor."""
    error, said = solved(name)
    assert error < 1e-5 and error < 10 * said.hypergradient_error < 1e-3
    assert (said.unsolved, said.is_bound) == (0, False)


OTHER_WAYS: list[tuple[list[str], dict[str, Any], float]] = [  # names, settings, the error
    (["softmax mean bias", "module beside", "leaf direct and upstream"], {"cached": False}, 1e-5),
    *((["softmax mean bias", "ridge mean", "anchored softmax"],
       {"inner": inner, "how": "loss", "steps": steps}, 1e-6)
      for inner, steps in ((Newton(), 1), (GradientDescent(), 300), (INNER, 80))),
    (["whole network", "softmax mean bias"],
     {"linear": Perturbed(tol=1e-8, damping=2.0), "damping": 2.0}, 1e-5),
]  # fmt: skip


@pytest.mark.parametrize("name, settings, most", [
    (name, settings, most) for names, settings, most in OTHER_WAYS for name in names
])  # fmt: skip
def test_other_ways(name: str, settings: dict[str, Any], most: float) -> None:
    """Features of the closure, others at each call, are told apart by their place in the graph;
    loss tensors of a linear head; a damped system."""
    error, said = solved(name, **settings)
    assert error < most and said.unsolved == 0


NETWORKS = ["two layers anchored", "whole network"]


@pytest.mark.parametrize("symmetric, order", [(False, 1), (True, 2)])
@pytest.mark.parametrize("name", ["softmax mean bias", "ridge mean", *NETWORKS])
def test_the_error_falls_with_the_step(name: str, symmetric: bool, order: int) -> None:
    """By half, or by a quarter, when the step is halved; where nothing is curved there is none."""
    inner, errors = INNER if name in NETWORKS else Newton(), []
    for step in (0.04, 0.02, 0.01):
        linear = Perturbed(symmetric, step, steps=300, tol=1e-11)
        error, said = solved(name, linear, inner, steps=200)
        errors.append(error)
        assert error < 10 * said.hypergradient_error
    if name == "ridge mean" and symmetric:
        assert max(errors) < 1e-9  # phi is linear in the tilt, the loss's mixed term bilinear
        return
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    # The next term is a step's part of the first: what halving misses halves too.
    assert abs(orders[1] - order) < 0.25 and abs(orders[1] - order) < abs(orders[0] - order) + 0.1


UNSOLVED = {  # linear, inner, reason, what is said; the last is no fault of the solves
    "too few steps": (Perturbed(steps=1), GradientDescent(), MAX_STEPS, "give linear= more steps"),
    "too short a step": (Perturbed(step=1e-14), INNER, None, "not solved|inexact"),
    "too long a step": (Perturbed(False, 1.0, tol=1e-8), INNER, INEXACT, ""),
}


@pytest.mark.parametrize("case", UNSOLVED)
def test_an_answer_that_is_none_warns(case: str) -> None:
    linear, inner, reason, text = UNSOLVED[case]
    with pytest.warns(UnsolvedWarning, match=text):
        error, said = solved("two layers anchored", linear, inner, steps=300)
    assert said.unsolved == 1 and said.cg_reason == (reason or said.cg_reason)
    assert error < 10 * said.hypergradient_error and (error > 0.01 or reason != INEXACT)


# Against conjugate gradient.


def test_the_tilt_is_relative_to_what_the_inner_solver_left() -> None:
    """Where the inner problem is not solved, the answer is that of eq. (8) there, as CG's is."""
    task, both = problem("two layers anchored"), []
    for linear in (CG(200, 1e-12), CLOSE):
        parent = make_learner(task, inner=GradientDescent(), linear=linear, max_error=1e9)
        learner, loss = adapt(parent, task, "closure", 3)
        both.append(hypergradient(task, loss))
        assert learner.diagnostics.inner_gradient_norm > 1e-3
    assert relative_error(both[1], both[0]) < 1e-5


def test_a_regulariser_of_ones_own() -> None:
    """With theta in it."""
    data, grads = x(), []
    transform = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
    for settings in (EXACT, WITHOUT):
        torch.manual_seed(1)
        parent = ImplicitGBML(nn.Linear(4, 3), transform, 0.1, anchor="init", **settings)
        F.cross_entropy(adapted(data, 100, parent)(data), Y.roll(1)).backward()
        grads.append([p.grad for p in parent.parameters()])
    assert relative_error(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("inner, samples", [
    (Newton(), 6), (GradientDescent(), 6), (INNER, 6), (Newton(), 520),  # beyond a factor
])  # fmt: skip
def test_many_heads_at_once(inner: object, samples: int) -> None:
    """Each with a tilt of its own; those of one task have no query loss."""
    h, y = torch.randn(4, samples, 5), (torch.arange(samples) % 3).expand(4, samples)
    l2, grads = torch.tensor(0.5, requires_grad=True), []
    module, query = nn.Linear(5, 3), torch.randn(4, 2, 5)
    weight = torch.tensor([1.0, 100.0, 0.0, 1e-6]).view(4, 1, 1)
    for linear in (CG(300, 1e-12), CLOSE):
        leaf = h.clone().requires_grad_()
        head = ImplicitCGHead(module, 0.3, l2=l2, anchor="init", inner=inner, linear=linear)
        together = head.adapt_together(leaf, y, steps=300)
        (weight * together(query).square()).sum().backward()
        parts = F.normalize(leaf.grad.flatten(1), eps=1e-30)  # each task as if it were alone
        grads.append([parts, l2.grad, module.weight.grad])
        l2.grad = module.weight.grad = module.bias.grad = None
    assert relative_error(grads[1], grads[0]) < 1e-6
    assert bool((grads[1][0][2] == 0).all())
    assert [each.unsolved for each in together.diagnostics] == [0, 0, 0, 0]


# A network of two layers.


def maml(net: nn.Module | None = None, **changes: Any) -> ImplicitMAML:
    return ImplicitMAML(net or network(), **{"lr": 0.1, "l2": 0.5, **WITHOUT, **changes})


def adapted(inputs: Tensor, steps: int, parent: Any = None, **clone: str) -> Any:
    """A clone of the parent, by a closure."""
    learner = (parent or maml()).clone(**clone)
    learner.adapt(lambda: F.cross_entropy(learner(inputs), Y), steps=steps)
    return learner


def test_a_warm_start_needs_fewer_gradients() -> None:
    data, calls, grads = x(), [], []
    parent = ImplicitCGHead(network(), 0.1, l2=0.5, warm_start=True, **WITHOUT)
    for _ in range(2):
        h = data.clone().requires_grad_()
        learner = adapted(h, 100, parent, task="a")
        F.cross_entropy(learner(data), Y.roll(1)).backward()
        calls.append(learner.diagnostics.cg_steps)
        grads.append([h.grad])
    assert calls[1] < calls[0] and relative_error(*grads) < 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
def test_single_precision(symmetric: bool) -> None:
    """By default a symmetric difference is good for it; either says how wrong it is."""
    grads = []
    low = {"inner": LBFGS(), "linear": Perturbed(symmetric)}
    for dtype, settings in ((torch.float64, EXACT), (torch.float32, low)):
        torch.manual_seed(0)
        net, data = network().to(dtype), x().to(dtype)
        parent = maml(net, **settings)
        learner = adapted(data, 100, parent)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if symmetric else "ignore", UnsolvedWarning)
            F.cross_entropy(learner(data), Y.roll(1)).backward()
        grads.append([p.grad.double() for p in net.parameters()])
    error = relative_error(grads[1], grads[0])
    assert error < 10 * parent.diagnostics.hypergradient_error and error < 0.1


# What the extra calls of the closure leave behind: nothing.


def test_batch_norm_and_dropout() -> None:
    """The hypergradient, a buffer's too, is that of the closure's last call; nothing else moves."""
    data, query, grads = x(), x(), []
    for linear in (CG(200, 1e-12), CLOSE):
        torch.manual_seed(3)
        net = Made(
            lambda own, x: own.last(F.dropout(own.scale * own.norm(own.first(x)).tanh(), 0.3)),
            first=nn.Linear(4, 8), norm=nn.BatchNorm1d(8), last=nn.Linear(8, 3),
        )  # fmt: skip
        net.register_buffer("scale", torch.ones(8, requires_grad=True))
        parent = ImplicitMAML(net, lr=0.1, l2=2.0, linear=linear, max_error=1e9)
        learner = adapted(data, 5, parent)
        loss = F.cross_entropy(learner(query), Y.roll(1))
        buffers = [*learner.module.buffers()]
        values, state = [b.clone() for b in buffers], torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        for mine, before, value in zip(learner.module.buffers(), buffers, values, strict=True):
            assert mine is before and torch.equal(mine, value)
        grads.append([p.grad for p in (*net.parameters(), net.scale)])
    assert relative_error(grads[1], grads[0]) < 1e-5


def test_the_learner_is_as_it_was() -> None:
    """Parameters, and a hypergradient that is asked for twice; none where it is zero."""
    data = x()
    h = data.clone().requires_grad_()
    learner = adapted(h, 100)
    before = list(learner.module.parameters())
    loss = F.cross_entropy(learner(data), Y.roll(1))
    loss.backward(retain_graph=True)
    once = h.grad.clone()
    assert all(a is b for a, b in zip(before, learner.module.parameters(), strict=True))
    loss.backward()
    assert torch.equal(h.grad, 2 * once)
    h.grad, learner = None, adapted(h, 50)
    (0.0 * learner(data).sum()).backward()
    assert h.grad is None or not bool(h.grad.any())
    assert learner.diagnostics.cg_steps == 0


def task_loss(parent: ImplicitCGHead, data: Tensor, seen: list) -> Tensor:
    """A query loss that outlives its learner."""
    learner = adapted(data, 30, parent)
    seen.append(weakref.ref(learner))
    return F.cross_entropy(learner(data), Y.roll(1))


@pytest.mark.usefixtures("no_collector")
def test_a_loss_may_outlive_its_learner_and_takes_it_along() -> None:
    net, seen, data = network(), [], x()
    parent = maml(net)
    losses = [task_loss(parent, data, seen) for _ in range(2)]
    gc.collect()
    sum(losses).backward()
    got = flat(p.grad for p in net.parameters())
    assert [ref() for ref in seen] == [None, None], "the learners live on after backward()"
    net.zero_grad()
    (2 * F.cross_entropy(adapted(data, 30, parent)(data), Y.roll(1))).backward()
    assert relative_error([got], [flat(p.grad for p in net.parameters())]) < 1e-9
    assert losses
    loss = task_loss(parent, data, seen)  # dropped without a backward pass
    del loss
    gc.collect()
    assert seen[2]() is None


def test_a_learner_that_is_gone() -> None:
    """Its parameters alone do not hold it."""
    learner = adapted(x(), 5)
    loss = sum(p.square().sum() for p in learner.module.parameters())
    del learner
    gc.collect()
    with pytest.raises(RuntimeError, match=r"expected the learner .* keep the learner"):
        loss.backward()


def test_a_variable_that_was_bound_anew() -> None:
    """Python's closures look their variables up when they are called."""
    parent, losses = maml(), []
    for _ in range(2):
        learner, data = parent.clone(), x()
        learner.adapt(lambda: F.cross_entropy(learner(data), Y), steps=5)  # noqa: B023
        losses.append(F.cross_entropy(learner(data), Y.roll(1)))
    with pytest.raises(RuntimeError, match="stands for something else") as caught:
        sum(losses).backward()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["data", "draws anew"])
def test_another_loss_in_backward(change: str) -> None:
    learner, data = maml().clone(), x()
    source = torch.Generator().manual_seed(0)

    def loss() -> Tensor:
        noise = torch.randn(6, 4, generator=source) if change == "draws anew" else 0.0
        return F.cross_entropy(learner(data + noise), Y)

    learner.adapt(loss, steps=5)
    query = F.cross_entropy(learner(x()), Y)
    if change == "data":
        data.mul_(2.0)
    with pytest.raises(RuntimeError, match="expected adapt.* another one"):
        query.backward()


def test_what_is_refused() -> None:
    data, learner = x(), ImplicitMAML(network(), lr=0.1, linear=Perturbed()).clone()
    with pytest.raises(TypeError, match=r"adapt: expected a closure.*adapt\(closure, steps=K\)"):
        learner.adapt(F.cross_entropy(learner(data), Y))
    for inner in (Newton(), GradientDescent(adaptive=True)):
        with pytest.raises(RuntimeError, match=r"use inner=LBFGS\(\) or GradientDescent\(\)"):
            adapted(data, 5, maml(inner=inner))
    for setting in ({"steps": 0}, {"tol": 0.0}, {"damping": -1.0}, {"step": -1.0}):
        with pytest.raises(ValueError, match=f"Perturbed: {next(iter(setting))}.*expected"):
            Perturbed(**setting)
