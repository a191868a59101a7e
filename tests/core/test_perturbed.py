"""The hypergradient by a perturbed inner problem, against oracles with second derivatives."""

import functools
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from attention import kernel
from oracles import flat, peak_of_live_tensors, relative_error
from problems import NAMES, adapt, hypergradient, make_learner, problem, truth
from small_task import SIX_LABELS as Y
from small_task import six_inputs as x
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from l2l_implicit import (
    CG,
    LBFGS,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    Newton,
    Perturbed,
    UnsolvedWarning,
)
from l2l_implicit.linear_solvers.solution import INEXACT, MAX_STEPS

pytestmark = pytest.mark.usefixtures("float64")
INNER = LBFGS(tol=1e-12)
CLOSE = Perturbed(tol=1e-8)
WHOLE = ["two layers", "two layers anchored", "whole network", "own output nudged"]


# Against the implicit function theorem with dense matrices.


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_theta(name: str) -> None:
    """The error is no more than what is said of it; that is an estimate, hence the factor."""
    task = problem(name)
    learner, loss = adapt(make_learner(task, inner=INNER, linear=CLOSE), task, "closure", 100)
    error, said = relative_error(hypergradient(task, loss), truth(name)), learner.diagnostics
    assert error < 1e-5 and error < 10 * said.hypergradient_error < 1e-3
    assert (said.unsolved, said.is_bound) == (0, False)


@pytest.mark.parametrize("name", ["softmax mean bias", "module beside", "leaf direct and upstream"])
def test_features_computed_in_the_closure(name: str) -> None:
    """Others at each call; they are told apart by their place in the graph."""
    task = problem(name)
    parent = make_learner(task, inner=INNER, linear=CLOSE)
    learner, loss = adapt(parent, task, "closure", 100, cached=False)
    assert relative_error(hypergradient(task, loss), truth(name)) < 1e-5
    assert learner.diagnostics.unsolved == 0


@pytest.mark.parametrize("inner, steps", [(Newton(), 1), (GradientDescent(), 300), (INNER, 80)])
@pytest.mark.parametrize("name", ["softmax mean bias", "ridge mean", "anchored softmax"])
def test_loss_tensors_of_a_linear_head(name: str, inner: object, steps: int) -> None:
    task = problem(name)
    _, loss = adapt(make_learner(task, inner=inner, linear=CLOSE), task, "loss", steps)
    assert relative_error(hypergradient(task, loss), truth(name)) < 1e-6


@pytest.mark.parametrize("symmetric, order", [(False, 1), (True, 2)])
@pytest.mark.parametrize("name", ["softmax mean bias", "ridge mean", *WHOLE[1:3]])
def test_the_error_falls_with_the_step(name: str, symmetric: bool, order: int) -> None:
    """By half, or by a quarter, when the step is halved; where nothing is curved there is none."""
    task, errors = problem(name), []
    inner = INNER if name in WHOLE else Newton()
    for step in (0.04, 0.02, 0.01):
        linear = Perturbed(symmetric, step, steps=300, tol=1e-11)
        learner, loss = adapt(make_learner(task, inner=inner, linear=linear), task, "closure", 200)
        errors.append(relative_error(hypergradient(task, loss), truth(name)))
        assert errors[-1] < 10 * learner.diagnostics.hypergradient_error
    if name == "ridge mean" and symmetric:
        assert max(errors) < 1e-9  # phi is linear in the tilt, the loss's mixed term bilinear
        return
    orders = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    # The next term is a step's part of the first: what halving misses halves too.
    assert abs(orders[1] - order) < 0.25 and abs(orders[1] - order) < abs(orders[0] - order) + 0.1


def test_the_tilt_is_relative_to_what_the_inner_solver_left() -> None:
    """Where the inner problem is not solved, the answer is that of eq. (8) there, as CG's is."""
    task = problem("two layers anchored")
    both = []
    for linear in (CG(200, 1e-12), CLOSE):
        parent = make_learner(task, inner=GradientDescent(), linear=linear, max_error=1e9)
        learner, loss = adapt(parent, task, "closure", 3)
        both.append(hypergradient(task, loss))
        assert learner.diagnostics.inner_gradient_norm > 1e-3
    assert relative_error(both[1], both[0]) < 1e-5


@pytest.mark.parametrize("name", ["whole network", "softmax mean bias"])
def test_damping(name: str) -> None:
    task = problem(name)
    parent = make_learner(task, inner=INNER, linear=Perturbed(tol=1e-8, damping=2.0))
    _, loss = adapt(parent, task, "closure", 100)
    assert relative_error(hypergradient(task, loss), truth(name, 2.0)) < 1e-5


class Diagonal(ImplicitCGHead):
    """A regulariser of its own, with theta in it."""

    def __init__(self, model: nn.Module, lr: float, **settings) -> None:
        super().__init__(model, lr, **settings)
        self.logits = nn.ParameterList(torch.randn_like(p) for p in model.parameters())

    def regularizer(self, parameters, anchor):
        terms = zip(parameters, anchor, self.logits, strict=True)
        return 0.5 * sum((F.softplus(s) * (p - a).square()).sum() for p, a, s in terms)


def test_a_regulariser_of_ones_own() -> None:
    data, grads = x(), []
    for inner, linear in ((Newton(100, 1e-12), CG(100, 1e-12)), (INNER, CLOSE)):
        torch.manual_seed(1)
        parent = Diagonal(nn.Linear(4, 3), 0.1, anchor="init", inner=inner, linear=linear)
        learner = parent.clone()
        learner.adapt(lambda fit=learner: F.cross_entropy(fit(data), Y), steps=100)
        F.cross_entropy(learner(data), Y.roll(1)).backward()
        grads.append([p.grad for p in parent.parameters()])
    assert relative_error(grads[1], grads[0]) < 1e-5


@pytest.mark.parametrize("inner", [Newton(), GradientDescent(), INNER], ids=repr)
def test_many_heads_at_once(inner: object) -> None:
    """Each with a tilt of its own; those of one task have no query loss."""
    h, y = torch.randn(4, 6, 5), (torch.arange(6) % 3).expand(4, 6)
    l2, grads = torch.tensor(0.5, requires_grad=True), []
    torch.manual_seed(1)
    module, query = nn.Linear(5, 3), torch.randn(4, 2, 5)
    weight = torch.tensor([1.0, 100.0, 0.0, 1e-6]).view(4, 1, 1)
    for linear in (CG(300, 1e-12), CLOSE):
        leaf = h.clone().requires_grad_()
        head = ImplicitCGHead(module, 0.3, l2=l2, anchor="init", inner=inner, linear=linear)
        adapted = head.adapt_together(leaf, y, steps=300)
        (weight * adapted(query).square()).sum().backward()
        parts = F.normalize(leaf.grad.flatten(1), eps=1e-30)  # each task as if it were alone
        grads.append([parts, l2.grad, module.weight.grad])
        l2.grad = module.weight.grad = module.bias.grad = None
    assert relative_error(grads[1], grads[0]) < 1e-6
    assert bool((grads[1][0][2] == 0).all())
    assert [each.unsolved for each in adapted.diagnostics] == [0, 0, 0, 0]


def test_more_samples_than_a_factor_takes() -> None:
    h, y = torch.randn(2, 520, 3), (torch.arange(520) % 2).expand(2, 520)
    grads = []
    for linear in (CG(50, 1e-12), CLOSE):
        leaf = h.clone().requires_grad_()
        torch.manual_seed(1)
        head = ImplicitCGHead(nn.Linear(3, 2), 0.3, linear=linear)
        head.adapt_together(leaf, y)(h[:, :4]).square().sum().backward()
        grads.append([leaf.grad])
    assert relative_error(grads[1], grads[0]) < 1e-6


def test_a_warm_start_needs_fewer_gradients() -> None:
    net, data, calls, grads = Bent(torch.tanh), x(), [], []
    parent = ImplicitCGHead(net, 0.1, l2=0.5, warm_start=True, inner=INNER, linear=CLOSE)
    for _ in range(2):
        learner = parent.clone(task="a")
        h = data.clone().requires_grad_()
        learner.adapt(lambda fit=learner, h=h: F.cross_entropy(fit(h), Y), steps=100)
        F.cross_entropy(learner(data), Y.roll(1)).backward()
        calls.append(learner.diagnostics.cg_steps)
        grads.append([h.grad])
    assert calls[1] < calls[0] and relative_error(*grads) < 1e-5


# Modules that cannot be differentiated twice.


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs.tanh())
        return inputs.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].square())


class Bent(nn.Module):
    def __init__(self, bend: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.bend = nn.Linear(4, 5), nn.Linear(5, 3), bend

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.bend(self.first(inputs)))


class Attention(nn.Module):
    """One head over six tokens of four numbers, by torch's kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.last = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        q, k, v = self.make(inputs).view(1, 1, 6, 24).chunk(3, dim=3)
        return self.last(F.scaled_dot_product_attention(q, k, v)[0, 0])


def meta_gradient(make: Callable[[], nn.Module], **settings) -> list[Tensor]:
    """In the initial value and in the features; whole-network iMAML."""
    torch.manual_seed(0)
    net, theta = make(), torch.randn(4, 4, requires_grad=True)
    data, learner = x(), ImplicitMAML(net, lr=0.1, l2=0.5, **settings).clone()
    h = torch.tanh(data @ theta)
    learner.adapt(lambda: F.cross_entropy(learner(h), Y), steps=100)
    F.cross_entropy(learner(h), Y.roll(1)).backward()
    return [theta.grad, *(p.grad for p in net.parameters())]


EXACT = {"inner": Newton(100, 1e-12), "linear": CG(200, 1e-12)}
WITHOUT = {"inner": INNER, "linear": CLOSE}


def test_a_function_that_is_differentiable_once() -> None:
    expected = meta_gradient(lambda: Bent(torch.tanh), **EXACT)
    assert relative_error(meta_gradient(lambda: Bent(Once.apply), **WITHOUT), expected) < 1e-5
    with pytest.raises((RuntimeError, UnsolvedWarning), match=r"linear=Perturbed\(\)"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnsolvedWarning)
            meta_gradient(lambda: Bent(Once.apply), **EXACT)


def test_fused_attention() -> None:
    """Its kernel has no second derivative; the plain one, which has, is the oracle."""
    with kernel("MATH"):
        expected = meta_gradient(Attention, **EXACT)
    with kernel("FLASH_ATTENTION"):
        assert relative_error(meta_gradient(Attention, **WITHOUT), expected) < 1e-5
        with pytest.raises(RuntimeError, match=r"linear=Perturbed\(\)"):
            meta_gradient(Attention, **EXACT)


# What the extra calls of the closure leave behind: nothing.


class Noisy(nn.Module):
    """Batch norm in training mode, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(F.dropout(torch.tanh(self.norm(self.first(inputs))), 0.3))


def test_batch_norm_and_dropout() -> None:
    """The hypergradient is that of the closure's last call, and no other number moves."""
    data, query, grads = x(), x(), []
    for linear in (CG(200, 1e-12), CLOSE):
        torch.manual_seed(3)
        net = Noisy()
        settings = {"linear": linear, "max_error": 1e9}
        parent = ImplicitMAML(net, lr=0.1, l2=2.0, **settings)
        learner = parent.clone()
        learner.adapt(lambda fit=learner: F.cross_entropy(fit(data), Y), steps=5)
        loss = F.cross_entropy(learner(query), Y.roll(1))
        buffers = [*learner.module.buffers()]
        values, state = [b.clone() for b in buffers], torch.get_rng_state()
        loss.backward()
        assert torch.equal(torch.get_rng_state(), state)
        for mine, before, value in zip(learner.module.buffers(), buffers, values, strict=True):
            assert mine is before and torch.equal(mine, value)
        grads.append([p.grad for p in net.parameters()])
    assert relative_error(grads[1], grads[0]) < 1e-5


def test_the_learner_is_as_it_was() -> None:
    """Parameters, and a hypergradient that is asked for twice."""
    learner = ImplicitMAML(Bent(torch.tanh), lr=0.1, **WITHOUT).clone()
    data = x()
    h = data.clone().requires_grad_()
    learner.adapt(lambda: F.cross_entropy(learner(h), Y), steps=100)
    before = list(learner.module.parameters())
    loss = F.cross_entropy(learner(data), Y.roll(1))
    loss.backward(retain_graph=True)
    once = h.grad.clone()
    assert all(a is b for a, b in zip(before, learner.module.parameters(), strict=True))
    loss.backward()
    assert torch.equal(h.grad, 2 * once)


def task_loss(parent: ImplicitCGHead, data: Tensor, seen: list) -> Tensor:
    """A query loss that outlives its learner."""
    learner = parent.clone()
    seen.append(weakref.ref(learner))
    learner.adapt(lambda: F.cross_entropy(learner(data), Y), steps=30)
    return F.cross_entropy(learner(data), Y.roll(1))


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_loss_may_outlive_its_learner_and_takes_it_along() -> None:
    net, seen, data = Bent(torch.tanh), [], x()
    parent = ImplicitMAML(net, lr=0.1, **WITHOUT)
    losses = [task_loss(parent, data, seen) for _ in range(2)]
    gc.collect()
    sum(losses).backward()
    got = flat(p.grad for p in net.parameters())
    assert [ref() for ref in seen] == [None, None], "the learners live on after backward()"
    for parameter in net.parameters():
        parameter.grad = None
    learner = parent.clone()
    learner.adapt(lambda: F.cross_entropy(learner(data), Y), steps=30)
    (2 * F.cross_entropy(learner(data), Y.roll(1))).backward()
    assert relative_error([got], [flat(p.grad for p in net.parameters())]) < 1e-9
    assert losses


def test_dropped_without_backward() -> None:
    seen, data = [], x()
    loss = task_loss(ImplicitMAML(Bent(torch.tanh), lr=0.1, **WITHOUT), data, seen)
    del loss
    gc.collect()
    assert seen[0]() is None


def test_a_learner_that_is_gone() -> None:
    """Its parameters alone do not hold it."""
    learner, data = ImplicitMAML(Bent(torch.tanh), lr=0.1, **WITHOUT).clone(), x()
    learner.adapt(lambda fit=learner: F.cross_entropy(fit(data), Y), steps=5)
    loss = sum(p.square().sum() for p in learner.module.parameters())
    del learner
    gc.collect()
    with pytest.raises(RuntimeError, match=r"expected the learner .* keep the learner"):
        loss.backward()


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_memory_is_flat_in_the_steps() -> None:
    parent = ImplicitMAML(
        nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 3)), lr=0.01,
        inner=GradientDescent(), linear=Perturbed(steps=3),
    )  # fmt: skip
    data, peaks = torch.randn(6, 200), []

    def run(steps: int) -> None:
        learner = parent.clone()
        learner.adapt(lambda: F.cross_entropy(learner(data), Y), steps=steps)
        F.cross_entropy(learner(data), Y.roll(1)).backward()

    run(1)
    for steps in (1, 60):
        peaks.append(peak_of_live_tensors(functools.partial(run, steps)))
    assert peaks[1] < 1.02 * peaks[0]


# What cannot be right says so.


def test_a_variable_that_was_bound_anew() -> None:
    """Python's closures look their variables up when they are called."""
    parent, losses = ImplicitMAML(Bent(torch.tanh), lr=0.1, **WITHOUT), []
    for _ in range(2):
        learner, data = parent.clone(), x()
        learner.adapt(lambda: F.cross_entropy(learner(data), Y), steps=5)  # noqa: B023
        losses.append(F.cross_entropy(learner(data), Y.roll(1)))
    with pytest.raises(RuntimeError, match="stands for something else") as caught:
        sum(losses).backward()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["data", "draws anew"])
def test_another_loss_in_backward(change: str) -> None:
    learner, data = ImplicitMAML(Bent(torch.tanh), lr=0.1, **WITHOUT).clone(), x()
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
    net, data = Bent(torch.tanh), x()
    learner = ImplicitMAML(net, lr=0.1, linear=Perturbed()).clone()
    with pytest.raises(TypeError, match=r"adapt: expected a closure.*adapt\(closure, steps=K\)"):
        learner.adapt(F.cross_entropy(learner(data), Y))
    for inner in (Newton(), GradientDescent(adaptive=True)):
        learner = ImplicitMAML(net, lr=0.1, inner=inner, linear=Perturbed()).clone()
        with pytest.raises(RuntimeError, match=r"use inner=LBFGS\(\) or GradientDescent\(\)"):
            learner.adapt(lambda: F.cross_entropy(learner(data), Y), steps=5)  # noqa: B023
    for setting in ({"steps": 0}, {"tol": 0.0}, {"damping": -1.0}, {"step": -1.0}):
        with pytest.raises(ValueError, match=f"Perturbed: {next(iter(setting))}.*expected"):
            Perturbed(**setting)


UNSOLVED = {
    "too few steps": (Perturbed(steps=1), GradientDescent(), MAX_STEPS, "give linear= more steps"),
    "too short a step": (Perturbed(step=1e-14), INNER, None, "not solved|inexact"),
}


@pytest.mark.parametrize("case", UNSOLVED)
def test_an_answer_that_is_none_warns(case: str) -> None:
    linear, inner, reason, text = UNSOLVED[case]
    task = problem("two layers anchored")
    parent = make_learner(task, inner=inner, linear=linear)
    learner, loss = adapt(parent, task, "closure", 300)
    with pytest.warns(UnsolvedWarning, match=text):
        error = relative_error(hypergradient(task, loss), truth("two layers anchored"))
    said = learner.diagnostics
    assert said.unsolved == 1 and said.cg_reason == (reason or said.cg_reason)
    assert error < 10 * said.hypergradient_error


def test_too_long_a_step_is_measured() -> None:
    """Nothing is wrong with the solves: the difference itself is no derivative any more."""
    task = problem("two layers anchored")
    parent = make_learner(task, inner=INNER, linear=Perturbed(False, 1.0, tol=1e-8))
    learner, loss = adapt(parent, task, "closure", 300)
    with pytest.warns(UnsolvedWarning):
        error = relative_error(hypergradient(task, loss), truth("two layers anchored"))
    assert learner.diagnostics.cg_reason == INEXACT
    assert 0.01 < error < 10 * learner.diagnostics.hypergradient_error


@pytest.mark.parametrize("symmetric", [True, False])
def test_single_precision(symmetric: bool) -> None:
    """By default a symmetric difference is good for it; either says how wrong it is."""
    grads, said = [], None
    for dtype, settings in ((torch.float64, EXACT), (torch.float32, {"inner": LBFGS(),
                            "linear": Perturbed(symmetric)})):  # fmt: skip
        torch.manual_seed(0)
        net, data = Bent(torch.tanh).to(dtype), x().to(dtype)
        parent = ImplicitMAML(net, lr=0.1, l2=0.5, **settings)
        learner = parent.clone()
        learner.adapt(lambda fit=learner, z=data: F.cross_entropy(fit(z), Y), steps=100)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if symmetric else "ignore", UnsolvedWarning)
            F.cross_entropy(learner(data), Y.roll(1)).backward()
        grads.append([p.grad.double() for p in net.parameters()])
        said = parent.diagnostics
    error = relative_error(grads[1], grads[0])
    assert error < 10 * said.hypergradient_error and error < 0.1


def test_no_query_loss_in_phi() -> None:
    learner, data = ImplicitMAML(Bent(torch.tanh), lr=0.1, **WITHOUT).clone(), x()
    h = data.clone().requires_grad_()
    learner.adapt(lambda: F.cross_entropy(learner(h), Y), steps=50)
    (0.0 * learner(data).sum()).backward()
    assert h.grad is None or not bool(h.grad.any())
    assert learner.diagnostics.cg_steps == 0
