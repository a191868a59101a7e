"""Every kind of bad input is answered in one line: what was expected, what came, what to do."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_task import HOWS, adapt
from torch import Tensor, nn

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GaussNewton,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    Neumann,
    Newton,
)

X, Y = torch.randn(6, 4), torch.arange(6) % 3


def head(**settings) -> ImplicitCGHead:
    return ImplicitCGHead(nn.Linear(4, 3), **{"lr": 0.1, **settings})


def trained(**settings) -> ImplicitCGHead:
    """A clone that has taken one good step."""
    learner = head(**settings).clone()
    learner.adapt(F.cross_entropy(learner(X), Y))
    return learner


def message(kind: type[Exception], run: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        run()
    text = str(caught.value)
    assert "\n" not in text and "expected" in text and "got" in text
    assert text.count(";") + text.count(":") >= 1, "no remedy after the finding"
    return text


SETTINGS = [
    ("lr", 0.0, ValueError, "above 0"),
    ("lr", -0.1, ValueError, "above 0"),
    ("lr", float("nan"), ValueError, "finite"),
    ("lr", float("inf"), ValueError, "finite"),
    ("lr", "0.1", TypeError, "'0.1'"),
    ("lr", True, TypeError, "True"),
    ("lr", None, TypeError, "None"),
    ("lr", torch.tensor(0.1, requires_grad=True), TypeError, "meta-learned"),
    ("l2", -1e-9, ValueError, "at least 0"),
    ("l2", torch.tensor(-1.0, requires_grad=True), ValueError, "at least 0"),
    ("l2", torch.ones(2), ValueError, "override regularizer"),
    ("l2", float("nan"), ValueError, "finite"),
    ("l2", [0.1], TypeError, "number"),
    ("anchor", "zeros", ValueError, "'zero'"),
    ("anchor", "initial", ValueError, "did you mean 'init'"),
    ("anchor", None, ValueError, "'zero', 'init'"),
    ("inner", "newton", TypeError, "Newton()"),
    ("inner", Newton, TypeError, "Newton()"),
    ("inner", None, TypeError, "begin(lr)"),
    ("linear", "cg", TypeError, "CG()"),
    ("linear", CG, TypeError, "CG()"),
    ("max_error", -1.0, ValueError, "above 0"),
    ("max_error", float("nan"), ValueError, "finite"),
    ("loss", nn.CrossEntropyLoss(label_smoothing=0.1), ValueError, "adapt(closure)"),
    ("loss", nn.MSELoss(reduction="none"), ValueError, "mean or sum"),
    ("loss", F.cross_entropy, ValueError, "nn.CrossEntropyLoss"),
    ("linear", None, TypeError, "Direct()"),
    ("curvature", "hessian", TypeError, "linearize"),
    ("curvature", GaussNewton, TypeError, "call the class"),
    ("accuracy", 0.0, ValueError, "above 0"),
    ("inner", lambda at: at.point, TypeError, "begin(lr)"),
    ("lr", "auto", TypeError, "GradientDescent(adaptive=True)"),
    ("step", "newton", TypeError, "inner=Newton()"),
    ("solver", "direct", TypeError, "linear=CG(), Neumann() or Direct()"),
    ("cg_steps", 5, TypeError, "linear=CG(steps=...)"),
    ("cg_tol", 1e-3, TypeError, "linear=CG(tol=...)"),
    ("neumann_alpha", 0.1, TypeError, "linear=Neumann(step_size=...)"),
    ("damping", 1.0, TypeError, "linear=CG(damping=...)"),
    ("inner_tol", 0.1, TypeError, "max_error"),
    ("stop_tol", 0.1, TypeError, "Newton(tol=...)"),
]


@pytest.mark.parametrize("name, value, kind, hint", SETTINGS)
def test_settings(name: str, value: object, kind: type[Exception], hint: str) -> None:
    text = message(kind, lambda: head(**{name: value}))
    assert text.startswith(name) and hint in text


METHODS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: CG(steps=0), ValueError, "CG: steps (N): expected at least 1"),
    (lambda: CG(steps=2.0), TypeError, "whole number"),
    (lambda: CG(tol=0.0), ValueError, "CG: tol: expected a number above 0"),
    (lambda: CG(damping=-1.0), ValueError, "CG: damping: expected a number of at least 0"),
    (lambda: Neumann(step_size=-1.0), ValueError, "Neumann: step_size: expected a number above 0"),
    (lambda: Neumann(steps=0), ValueError, "at least 1"),
    (lambda: Direct(damping=float("nan")), ValueError, "finite"),
    (lambda: Newton(cg_steps=0), ValueError, "Newton: cg_steps: expected at least 1"),
    (lambda: Newton(tol=-1.0), ValueError, "Newton: tol: expected a number above 0"),
    (lambda: GradientDescent(tol=0.0), ValueError, "GradientDescent: tol: expected a number above"),
    (lambda: LBFGS(history=0), ValueError, "LBFGS: history: expected at least 1"),
    (lambda: LBFGS(tol=float("inf")), ValueError, "finite"),
    (lambda: ImplicitMAML(nn.Linear(2, 2), 0.1, inner="newtn"), TypeError, "Newton()"),
    *((lambda m=m: ImplicitCGHead(m, 0.1), TypeError, "torch.nn.Module")
      for m in (None, "linear", nn.Linear, [nn.Linear(2, 2)])),
    *((lambda c=c: c(nn.Linear(2, 2), 0.1, anchr="zero"), TypeError, "did you mean anchor?")
      for c in (ImplicitCGHead, ImplicitMAML)),
]  # fmt: skip


@pytest.mark.parametrize("make, kind, hint", METHODS)
def test_a_methods_own_settings(
    make: Callable[[], object], kind: type[Exception], hint: str
) -> None:
    assert hint in message(kind, make)


@pytest.mark.parametrize("value", [0, 0.0, torch.tensor(0.0), torch.tensor([0.5]), 3])
def test_settings_at_the_edge_are_accepted(value: object) -> None:
    assert head(l2=value).l2 is value


def test_numpys_numbers_are_numbers() -> None:
    for number in (np.float32(0.1), np.float64(0.1)):
        assert head(lr=number, l2=number).lr == pytest.approx(0.1)
    learner = head(inner=Newton(np.int64(5)), linear=CG(np.int64(5))).clone()
    learner.adapt(lambda: F.cross_entropy(learner(X), Y), steps=np.int64(2))


def nan_loss(learner: ImplicitCGHead) -> Tensor:
    return learner(X * float("nan")).sum()


LOSSES = [
    ("not a tensor", lambda learner: 3.0, TypeError, "tensor or a closure"),
    ("None", lambda learner: None, TypeError, "NoneType"),
    ("vector", lambda learner: learner(X).sum(1), ValueError, "shape (6,)"),
    ("constant", lambda learner: torch.tensor(1.0), ValueError, "graph"),
    ("nan", nan_loss, ValueError, "finite"),
    ("infinite", lambda learner: learner(X).sum() * float("inf"), ValueError, "finite"),
    ("of something else", lambda learner: torch.ones(3, requires_grad=True).sum(), ValueError,
     "none of them"),
    ("without the bias", lambda learner: (X @ learner.module.weight.t()).square().sum(),
     ValueError, "allow_unused=True"),
]  # fmt: skip


@HOWS
@pytest.mark.parametrize("name, loss, kind, hint", LOSSES)
def test_losses(name: str, loss: Callable, kind: type[Exception], hint: str, how: str) -> None:
    learner = trained()
    before = list(learner.module.parameters())
    text = message(kind, lambda: adapt(learner, lambda: loss(learner), how, 2))
    assert hint in text or how == "closure" and "closure" in text
    assert all(a is b for a, b in zip(before, learner.module.parameters(), strict=True))


def test_losses_of_other_moments() -> None:
    """Of earlier parameters, without gradients, of first order, with a number of steps."""
    learner = head().clone()
    loss = F.cross_entropy(learner(X), Y)
    assert "closure" in message(ValueError, lambda: learner.adapt(loss, steps=3))
    learner.adapt(loss)
    assert "none of them" in message(ValueError, lambda: learner.adapt(loss))
    with torch.no_grad():
        loss = F.cross_entropy(learner(X), Y)
    assert "closure" in message(ValueError, lambda: learner.adapt(loss))
    fomaml = head(first_order=True).clone()
    assert "finite" in message(ValueError, lambda: fomaml.adapt(nan_loss(fomaml)))


@pytest.mark.parametrize("steps, kind", [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_number_of_steps(steps: object, kind: type[Exception]) -> None:
    learner = trained()
    text = message(kind, lambda: learner.adapt(lambda: learner(X).square().sum(), steps=steps))
    assert text.startswith("steps (K)")


def test_frozen_parameters() -> None:
    parent = head()
    parent.module.bias.requires_grad_(False)
    learner = parent.clone()
    text = message(ValueError, lambda: learner.adapt(F.cross_entropy(learner(X), Y)))
    assert "bias" in text and "weight" not in text and "allow_nograd=True" in text


def test_nothing_to_adapt() -> None:
    learner = ImplicitCGHead(nn.ReLU(), 0.1, allow_nograd=True).clone()
    theta = torch.ones(3, requires_grad=True)
    message(ValueError, lambda: learner.adapt(learner(theta).sum()))


def test_parameters_of_two_dtypes() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).double())
    learner = ImplicitCGHead(module, 0.1).clone()
    theta = sum(p.sum() for p in learner.parameters())
    text = message(ValueError, lambda: learner.adapt(theta))
    assert "float32" in text and "float64" in text


@HOWS
def test_inner_gradient_not_finite(how: str) -> None:
    """The loss is finite and its gradient is not: sqrt at zero."""
    learner = head().clone()

    def loss() -> Tensor:
        outputs = learner(torch.zeros(2, 4) * learner.module.weight[0])
        return (outputs - learner.module.bias).square().sum().sqrt()

    message(FloatingPointError, lambda: adapt(learner, loss, how, 2))


@HOWS
def test_query_gradient_not_finite(how: str) -> None:
    learner = trained()
    adapt(learner, lambda: F.cross_entropy(learner(X), Y), how, 2)
    query = learner(X * float("nan")).sum()
    assert "query loss" in message(FloatingPointError, query.backward)


def test_loss_of_superseded_parameters() -> None:
    learner = trained()
    stale = F.cross_entropy(learner(X), Y)
    learner.adapt(F.cross_entropy(learner(X), Y))  # the same problem: nothing is replaced
    stale.backward(retain_graph=True)
    learner.adapt(F.cross_entropy(learner(X), Y.roll(1)))
    fresh = F.cross_entropy(learner(X), Y)
    for bad in (stale, fresh + stale):
        text = message(RuntimeError, lambda loss=bad: loss.backward(retain_graph=True))
        assert "second clone()" in text
    fresh.backward()


def test_learned_l2_that_turned_negative() -> None:
    """An optimiser may push it there; the next task must say so."""
    l2 = torch.tensor(0.1, requires_grad=True)
    parent = head(l2=l2)
    with torch.no_grad():
        l2.fill_(-0.2)
    learner = parent.clone()
    text = message(ValueError, lambda: learner.adapt(F.cross_entropy(learner(X), Y)))
    assert text.startswith("l2")


@pytest.mark.parametrize("reason", ["shape", "dtype"])
def test_inner_step_of_the_wrong_shape(reason: str) -> None:
    """An override's mistake must not become a learner in an odd state."""

    class Wrong(ImplicitCGHead):
        def inner_step(self, at):
            return at.point[:, :-1] if reason == "shape" else at.point.half()

    learner = Wrong(nn.Linear(4, 3), 0.1).clone()
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        learner.adapt(lambda: F.cross_entropy(learner(X), Y), steps=2)
    assert learner(X).shape == (6, 3)


def test_inference_mode_is_refused_with_the_mode_to_use() -> None:
    learner = head().clone()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        learner.adapt(lambda: learner(torch.ones(2, 4)).sum(), steps=2)
