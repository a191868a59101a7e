"""The three places to override: the examples of docs/subclassing.md against dense oracles."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit, minimize, polish, relative_error
from problems import EXACT, adapt, hypergradient, make_learner, problem, truth
from several_tasks import Batch, assert_alike
from small_task import HOWS
from torch import nn

from l2l_implicit import GradientDescent, Identity, ImplicitCGHead, UnsolvedWarning
from l2l_implicit.inner_solvers.protocol import InnerSolver
from l2l_implicit.vectors import flatten

pytestmark = pytest.mark.usefixtures("float64")
PAGE = Path(__file__).parents[2] / "docs" / "subclassing.md"


def examples() -> dict[str, tuple[str, type[ImplicitCGHead]]]:
    """Source and class of each fenced block of the page that defines one and runs alone."""
    found = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S):
        if "import" in block:
            names: dict[str, Any] = {}
            exec(compile(block, str(PAGE), "exec"), names)
            source = block[block.index("class ") :]
            name = re.findall(r"^class (\w+)", source)[0]
            found[name] = (source, names[name])
    return found


EXAMPLES = examples()
LearnedDiagonal, LBFGSB, DenseSolve = (
    EXAMPLES[name][1] for name in ("LearnedDiagonal", "LBFGSB", "DenseSolve")
)


NAMES = ["two layers anchored", "softmax mean bias", "anchored softmax", "scaled logits"]


def test_an_example_is_short() -> None:
    assert all(len(source.splitlines()) < 20 for source, _ in EXAMPLES.values())


class Base(ImplicitCGHead):
    """The same formula, carried by autograd: an override may call the base class's method."""

    def regularizer(self, parameters, anchor):
        return super().regularizer(parameters, anchor)


OVERRIDES: dict[str, Any] = {
    "regularizer": lambda phi, anchor: (flatten(phi) - flatten(anchor)).square().sum(),
    "inner_step": lambda at: at.point - 0.01 * at.gradient,
    "linear_solve": lambda hvp, b, start: Identity(0.1).solve(hvp, b),
}


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@HOWS
@pytest.mark.parametrize("place", OVERRIDES)
def test_an_override_of_one_learner_is_that_of_a_class(place: str, how: str) -> None:
    """A linear head, whose closed form asks for none of the three."""
    task, run, grads = problem("anchored softmax"), OVERRIDES[place], []
    own = make_learner(task, type("Own", (ImplicitCGHead,), {place: staticmethod(run)}))
    changed, plain = make_learner(task), make_learner(task)
    setattr(changed, place, run)
    for learner in (own, changed, plain):
        _, loss = adapt(learner, task, how, 3)
        grads.append(torch.autograd.grad(loss, [task.theta["backbone"], *task.head.parameters()]))
    assert relative_error(grads[1], grads[0]) == 0.0 and relative_error(grads[2], grads[0]) > 0.01


@pytest.mark.parametrize("place", OVERRIDES)
@pytest.mark.parametrize("value", [nn.Softplus(), 0.1])
def test_an_override_of_one_learner_is_a_function(place: str, value: object) -> None:
    """torch keeps a module where the method's name does not find it."""
    learner = ImplicitCGHead(nn.Linear(2, 2), 0.1)
    with pytest.raises(TypeError, match=f"^{place}: expected a function, got a"):
        setattr(learner, place, value)


@HOWS
@pytest.mark.parametrize("cls", [DenseSolve, Base])
@pytest.mark.parametrize("name", NAMES)
def test_override_gives_the_same_hypergradient(cls: type, name: str, how: str) -> None:
    task = problem(name)
    _, loss = adapt(make_learner(task, cls), task, how, 25)
    assert relative_error(hypergradient(task, loss), truth(name)) < 1e-8


BY_TENSOR = ["softmax mean bias", "anchored softmax"]  # a linear head's loss is known everywhere
SOLVED_BY_LBFGSB = [*((name, "closure", 1) for name in NAMES), *((n, "loss", 2) for n in BY_TENSOR)]


# Where L-BFGS-B stops depends on the last digit: it compares values of an objective near 1, equal
# to rounding within sqrt(2 eps / smallest eigenvalue) of the minimum, 7e-8 for 0.1. Relative to
# phi, of norm 0.4, that is 2e-7; the rest is for what curvature makes of it in the hypergradient.
FLAT = 1e-6


@pytest.mark.parametrize("name, how, steps", SOLVED_BY_LBFGSB)
def test_scipys_solver(name: str, how: str, steps: int) -> None:
    task = problem(name)
    learner, loss = adapt(make_learner(task, LBFGSB), task, how, steps)
    found = flat(learner.parameters())
    phi = polish(task.inner, found, task.leaves())
    got = hypergradient(task, loss)
    assert relative_error([found], [phi]) < FLAT
    assert relative_error(got, implicit(task.inner, task.outer, task.leaves(), phi)) < FLAT
    if how == "closure":  # linearised where it stopped: there, exact up to cg_tol = 1e-13
        there = implicit(task.inner, task.outer, task.leaves(), found)
        assert relative_error(got, there) < 1e-11


def test_scipys_solver_in_single_precision_and_an_active_bound() -> None:
    bounded = EXAMPLES["LBFGSB"][0].replace("jac=True", "bounds=[(-0.01, 0.01)] * 27, jac=True")
    names = dict(LBFGSB.inner_step.__globals__)
    exec(bounded, names)
    features = torch.randn(12, 8, dtype=torch.float32, requires_grad=True)
    labels, found = torch.arange(12) % 3, []
    with pytest.warns(UnsolvedWarning, match="inner") as caught:
        for cls in (LBFGSB, names["LBFGSB"]):
            learner = cls(torch.nn.Linear(8, 3, dtype=torch.float32), lr=0.1).clone()
            learner.adapt(lambda n=learner: F.cross_entropy(n(features), labels), steps=1)
            F.cross_entropy(learner(features), labels.roll(1)).backward()
            found.append(learner.diagnostics)
    assert len(caught) == 1 and found[0].inner_gradient_norm < 1e-4
    assert [notes.unsolved_inner for notes in found] == [0, 1]


@HOWS
@pytest.mark.parametrize("inner, steps", [(EXACT["inner"], 25), (GradientDescent(), 150)])
@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_learned_diagonal(anchor: str, inner: InnerSolver, steps: int, how: str) -> None:
    task = problem("softmax mean bias")
    parent = LearnedDiagonal(task.head, 0.9, anchor=anchor, **{**EXACT, "inner": inner})
    for logit in parent.logits:
        torch.nn.init.normal_(logit)
    backbone, logits = task.theta["backbone"], list(parent.logits)
    _, loss = adapt(parent, task, how, steps)
    loss.backward()
    leaves = [backbone, *logits, *task.head.parameters()]

    def inner(phi, theta, *rest):
        weights = torch.cat([F.softplus(s).reshape(-1) for s in rest[:2]])
        center = torch.cat([p.reshape(-1) for p in rest[2:]]) if anchor == "init" else 0.0
        support = task.support(task._net(phi), {}, task.embed({"backbone": theta}))
        return support + 0.5 * (weights * (phi - center).square()).sum()

    def outer(phi, theta, *rest):
        return task.query(task._net(phi), {}, task.embed({"backbone": theta}))

    phi = minimize(inner, task.start(), leaves, 0.9)
    expected = implicit(inner, outer, leaves, phi)
    assert all(p.grad is not None for p in leaves[:3])
    got = [p.grad if p.grad is not None else torch.full_like(p, math.nan) for p in leaves]
    assert relative_error(got, expected) < 1e-8


@pytest.mark.parametrize("cls", [DenseSolve, LBFGSB])
def test_overrides_serve_several_tasks(cls: type[ImplicitCGHead]) -> None:
    """Together as one by one."""
    said = assert_alike(Batch(), 1, 1e-8, cls=cls, anchor="init", **EXACT)
    assert cls is LBFGSB or {found.cg_reason for found in said} == {"dense solve"}
