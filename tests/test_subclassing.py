"""The three places to override, each in a few lines, against dense oracles."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from oracles import implicit, minimize, relative_error
from problems import EXACT, adapt, hypergradient, make_learner, problem
from scipy.optimize import minimize as scipy_minimize
from torch import nn

from l2l_implicit import ImplicitCGHead, LinearSolution

pytestmark = pytest.mark.usefixtures("float64")


class LearnedDiagonal(ImplicitCGHead):
    """A regulariser with one learned coefficient for each parameter."""

    def __init__(self, model, lr, **settings):
        super().__init__(model, lr, **settings)
        self.logits = nn.ParameterList(torch.randn_like(p) for p in model.parameters())

    def regularizer(self, parameters, anchor):
        terms = zip(parameters, anchor, self.logits, strict=True)
        return 0.5 * sum((F.softplus(s) * (p - a).square()).sum() for p, a, s in terms)


class LBFGS(ImplicitCGHead):
    """Each step minimises the local quadratic model with SciPy's L-BFGS-B, in a box."""

    def inner_step(self, at):
        def model(step):
            s = torch.from_numpy(step)
            curved = at.hvp(s)
            value = float(at.gradient @ s + 0.5 * (s @ curved))
            return value, (at.gradient + curved).numpy()

        start, box = torch.zeros_like(at.point).numpy(), [(-1.0, 1.0)] * at.point.numel()
        options = {"gtol": 1e-14, "ftol": 0.0, "maxiter": 500}
        found = scipy_minimize(
            model, start, jac=True, method="L-BFGS-B", bounds=box, options=options
        )
        return at.point + torch.from_numpy(found.x)


class DenseSolve(ImplicitCGHead):
    """The Hessian written out by products with the unit vectors."""

    def linear_solve(self, hvp, b, start):
        unit = torch.eye(b.numel(), dtype=b.dtype)
        hessian = torch.stack([hvp(column) for column in unit], dim=1)
        v = torch.linalg.solve(hessian, b)
        residual = float((b - hessian @ v).norm())
        return LinearSolution(v, b.numel(), residual, residual / float(b.norm()), "dense solve")


class SameFormula(ImplicitCGHead):
    """The closed form's own formula, carried by autograd."""

    def regularizer(self, parameters, anchor):
        pairs = zip(parameters, anchor, strict=True)
        return 0.5 * self.l2 * sum((p - a).square().sum() for p, a in pairs)


OVERRIDES = [LearnedDiagonal, LBFGS, DenseSolve, SameFormula]
# The first has several minima, between which a quadratic model without a line search may wander.
NAMES = ["two layers anchored", "softmax mean bias", "anchored softmax", "scaled logits"]
WAYS = ["loss", "closure"]


@pytest.mark.parametrize("cls", OVERRIDES)
def test_an_override_is_short(cls: type) -> None:
    assert len(inspect.getsource(cls).splitlines()) <= 20


CASES = [(cls, name) for cls in OVERRIDES[1:] for name in NAMES if (cls, name) != (LBFGS, NAMES[0])]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("cls, name", CASES)
def test_override_gives_the_same_hypergradient(cls: type, name: str, how: str) -> None:
    task = problem(name)
    parent = make_learner(task, cls)
    _, loss = adapt(parent, task, how, 25)
    phi = minimize(task.inner, task.start(), task.leaves(), task.lr)
    expected = implicit(task.inner, task.outer, task.leaves(), phi)
    assert relative_error(hypergradient(task, loss), expected) < 1e-8


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("step, steps", [("newton", 25), ("gradient", 150)])
@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_learned_diagonal(anchor: str, step: str, steps: int, how: str) -> None:
    task = problem("softmax mean bias")
    parent = LearnedDiagonal(task.head, 0.9, anchor=anchor, step=step, **EXACT)
    backbone, logits = task.theta["backbone"], list(parent.logits)
    _, loss = adapt(parent, task, how, steps)
    loss.backward()
    leaves = [backbone, *logits, *task.head.parameters()]
    initial = leaves[3:]

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
    assert len(initial) == 2


def test_same_formula_is_the_closed_form_to_rounding() -> None:
    task = problem("softmax mean bias")
    both = []
    for cls in (ImplicitCGHead, SameFormula):
        _, loss = adapt(make_learner(task, cls, step="gradient"), task, "closure", 5)
        both.append([g.clone() for g in hypergradient(task, loss)])
    assert relative_error(*both) < 1e-12


def test_the_default_regularizer_is_its_closed_form() -> None:
    """An override may call the method of the base class and add to it."""

    class Base(ImplicitCGHead):
        def regularizer(self, parameters, anchor):
            return super().regularizer(parameters, anchor)

    task = problem("anchored softmax")
    both = []
    for cls in (ImplicitCGHead, Base):
        _, loss = adapt(make_learner(task, cls), task)
        both.append([g.clone() for g in hypergradient(task, loss)])
    assert relative_error(*both) < 1e-10


def test_what_an_override_says_reaches_the_diagnostics() -> None:
    task = problem("softmax mean bias")
    parent = make_learner(task, DenseSolve)
    _, loss = adapt(parent, task)
    loss.backward()
    assert parent.diagnostics.cg_reason == "dense solve" and parent.diagnostics.cg_steps == 15
