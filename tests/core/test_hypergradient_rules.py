"""The adapted learner obeys autograd's rules; shared parameters are right, or an error."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from problems import EXACT, Problem, adapt, expected, hypergradient, make_learner, problem, truth
from small_task import HOWS
from small_task import adapt as take_steps
from torch import Tensor, nn

from l2l_implicit import CG, ImplicitCGHead

pytestmark = pytest.mark.usefixtures("float64")
NAME = "softmax mean bias"


def adapted(how: str = "closure") -> tuple[Problem, Any, Tensor]:
    """A problem, its learner, and the query loss."""
    task = problem(NAME)
    return task, *adapt(make_learner(task), task, how)


def test_several_clones_alive_interleaved() -> None:
    task = problem(NAME)
    parent = make_learner(task)
    clones, labels = [parent.clone() for _ in range(3)], torch.arange(12) % 3
    inputs = task.embed(task.theta)
    for _ in range(20):
        for shift, clone in enumerate(clones):
            clone.adapt(F.cross_entropy(clone(inputs[0]), labels.roll(shift)))
    losses = [task.query(clone, task.theta, inputs) for clone in clones]
    got = hypergradient(task, losses[2] + losses[0] + losses[1])
    total = [torch.zeros_like(g) for g in got]
    for shift in range(3):
        task.support = lambda net, t, h, s=shift: F.cross_entropy(net(h[0]), labels.roll(s))
        total = [a + b for a, b in zip(total, expected(task), strict=True)]
    assert relative_error(got, total) < 1e-8


@HOWS
def test_retained_graph_gives_the_gradient_again(how: str) -> None:
    task, _, loss = adapted(how)
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in task.leaves()]
    loss.backward()
    assert relative_error([t.grad for t in task.leaves()], [2 * g for g in once]) < 1e-12
    # A query loss linear in phi keeps no tensors, so the learner's node must say it itself.
    _, learner, _ = adapted(how)
    linear = sum(p.sum() for p in learner.parameters())
    linear.backward()
    for spent in (loss, linear):
        with pytest.raises(RuntimeError, match="second time"):
            spent.backward()


@pytest.mark.parametrize("linear", [False, True])
def test_higher_order_raises(linear: bool) -> None:
    """A second derivative would lack the curvature of the solution: no number rather than that."""
    task, learner, loss = adapted()
    loss = learner(task.embed(task.theta)[1]).sum() if linear else loss
    with pytest.raises(RuntimeError):
        (first,) = torch.autograd.grad(loss, task.theta["backbone"], create_graph=True)
        first.square().sum().backward()


def test_clone_of_an_adapted_clone() -> None:
    """The second learner starts at, and is anchored to, the first one's solution."""
    task = problem("anchored softmax", l2=0.5)
    del task.theta["l2"]
    parent, labels = make_learner(task), torch.arange(12) % 3
    x, x_query = task.embed(task.theta)
    first = parent.clone()
    first.adapt(lambda: F.cross_entropy(first(x), labels), steps=20)
    second = first.clone()
    second.adapt(lambda: F.cross_entropy(second(x), labels.roll(1)), steps=20)
    got = hypergradient(task, F.cross_entropy(second(x_query), labels[:9]))

    leaves = [t.detach().requires_grad_() for t in task.leaves()]
    h, h_query = task.embed({"backbone": leaves[0]})
    weight, bias = leaves[1:]
    for targets in (labels, labels.roll(1)):
        anchor = weight, bias
        for _ in range(150):
            loss = F.cross_entropy(F.linear(h, weight, bias), targets)
            loss = loss + 0.25 * sum(
                (p - a).square().sum() for p, a in zip((weight, bias), anchor, strict=True)
            )
            slopes = torch.autograd.grad(loss, (weight, bias), create_graph=True)
            weight, bias = weight - slopes[0], bias - slopes[1]
    unrolled_loss = F.cross_entropy(F.linear(h_query, weight, bias), labels[:9])
    assert relative_error(got, torch.autograd.grad(unrolled_loss, leaves)) < 1e-8


def test_adapting_on_after_backward() -> None:
    task = problem(NAME)
    learner, loss = adapt(make_learner(task), task, steps=1)
    loss.backward()
    inputs = task.embed(task.theta)
    learner.adapt(lambda: task.support(learner, task.theta, inputs), steps=30)
    got = hypergradient(task, task.query(learner, task.theta, inputs))
    assert relative_error(got, truth(NAME)) < 1e-8


@pytest.mark.parametrize("alone", [False, True])
def test_query_loss_of_one_parameter(alone: bool) -> None:
    task, learner, loss = adapted()
    query = task.outer
    task.outer = lambda phi, *leaves: (
        phi[-3:].square().sum() + (0 if alone else query(phi, *leaves))
    )
    own = learner.module.bias.square().sum()
    assert relative_error(hypergradient(task, own + (0 if alone else loss)), expected(task)) < 1e-8


def test_l2_of_another_dtype_and_shape() -> None:
    task = problem(NAME, l2=0.3)
    want = expected(task)
    l2 = torch.tensor([0.3], dtype=torch.float32, requires_grad=True)
    parent = ImplicitCGHead(task.head, task.lr, l2=l2, linear=CG(tol=1e-12))
    adapt(parent, task)[1].backward()
    assert l2.grad.shape == (1,) and l2.grad.dtype == torch.float32
    assert abs(float(l2.grad) - float(want[1])) < 1e-6 * abs(float(want[1]))


# Parameters shared between head and features.
#
# The head's weight W also makes the features, h = tanh(x W'). Where that is the learner's own and
# adapts, they are as in "own output nudged" of `problems.py`.


LABELS, L2 = torch.arange(8) % 4, 0.3
Inputs = tuple[Tensor, Tensor]  # support, query


@pytest.fixture
def parent(float64: None) -> ImplicitCGHead:
    return ImplicitCGHead(nn.Linear(4, 4, bias=False), 0.5, l2=L2, **EXACT)


@pytest.fixture
def inputs(float64: None) -> Inputs:
    return torch.randn(8, 4), torch.randn(8, 4)


def features(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(x @ weight.t())


@HOWS
def test_features_made_before_the_task(how: str, parent: ImplicitCGHead, inputs: Inputs) -> None:
    """Of the clone's own weight they are those of the parent's, whose hypergradient is that of
    "parent makes features" (`problems.py`)."""
    found = []
    for own in (True, False):
        learner = parent.clone()
        weight = (learner if own else parent).module.weight
        h, h_query = (features(x, weight) for x in inputs)
        take_steps(learner, lambda n=learner, h=h: F.cross_entropy(n(h), LABELS), how, 40)
        loss = F.cross_entropy(learner(h_query), LABELS.roll(1))
        found.append(torch.autograd.grad(loss, parent.module.weight))
    assert relative_error(*found) < 1e-8


@pytest.mark.parametrize("factor", [1.0, None])
@pytest.mark.parametrize("what", ["features", "outputs", "parameters"])
def test_what_is_kept_from_a_closures_call(
    what: str, factor: float | None, parent: ImplicitCGHead, inputs: Inputs
) -> None:
    """Features of its first or a query loss of its last: they depend on the parameters of one inner
    step, from where no gradient finds its way."""
    learner, kept = parent.clone(), {}
    h, h_query = (features(x, parent.module.weight) for x in inputs)

    def loss() -> Tensor:
        if "features" not in kept:
            kept["features"] = features(inputs[0], learner.module.weight)
        kept["outputs"] = learner(h_query)
        kept["parameters"] = h_query @ learner.module.weight.t()
        x = kept["features"] if what == "features" else h
        value = F.cross_entropy(learner(x), LABELS)
        return value if factor is None else factor * value

    learner.adapt(loss, steps=40)
    kept["features"] = learner(h_query)
    with pytest.raises(RuntimeError, match="kept from one of its calls"):
        F.cross_entropy(kept[what], LABELS).backward()
