"""Bad input: one line that says what was expected, what came, and what to do."""

import sys
import warnings
from pathlib import Path
from typing import Any

import higher  # noqa: F401  (these tests need the extra "baselines")
import pytest
import torch
import torch.nn.functional as F
from small_task import Made, message
from torch import nn
from warm_process import run

from l2l_implicit.baselines import Learn2LearnMAML, Reptile, UnrolledMAML

CLASSES = [UnrolledMAML, Learn2LearnMAML, Reptile]
EVERY = pytest.mark.parametrize("cls", CLASSES)
X, Y = torch.randn(6, 4), torch.arange(6) % 3


def head() -> nn.Module:
    return nn.Linear(4, 3)


@EVERY
@pytest.mark.parametrize("lr", [[], [torch.ones(3), torch.ones(3)], [0.1, 0.1],
                                nn.ParameterList([torch.ones(3, 4), torch.ones(1)])])  # fmt: skip
def test_a_step_size_for_each_parameter(lr: Any, cls: type) -> None:
    """Of another number or shape; elsewhere none at all."""
    several = "2 tensors, of the parameters' shapes or scalars, got ["
    expected = several if cls is UnrolledMAML else "one number, got several; pass one step size"
    assert f"lr: expected {expected}" in message(lambda: cls(head(), lr), ValueError)


class Own(torch.optim.SGD):
    """A class that higher has never heard of."""


SETTINGS = [
    ({"model": "cnn"}, TypeError, "model: expected a torch.nn.Module, got 'cnn'"),
    ({"lr": 0.0}, ValueError, "lr: expected a number above 0, got 0.0"),
    ({"lr": torch.ones(3)}, ValueError, "lr: expected one number, got a tensor of shape (3,)"),
]
OPTIMIZERS = [
    ({"optimizer": "adamm"}, ValueError, "did you mean 'adam'?"),
    ({"optimizer": 3}, TypeError, "optimizer: expected a name or a function of the parameters, "),
    ({"optimizer": lambda parameters: None}, TypeError, "torch.optim.Optimizer, got NoneType"),
    ({"optimizer": lambda _: torch.optim.SGD([nn.Parameter(torch.ones(1))])}, ValueError,
     "expected one of all the parameters that the function is given"),
    ({"optimizer": lambda parameters: torch.optim.SGD(parameters[:1])}, ValueError,
     "got SGD of 1 parameters where 2 are given"),
    ({"optimizer": torch.optim.LBFGS}, ValueError, "whose step() needs no closure, got LBFGS"),
]
NOT_BY_HIGHER = [  # and so not unrolled
    ({"optimizer": torch.optim.AdamW}, ValueError, "got AdamW; try SGD, Adam or RMSprop"),
    ({"optimizer": Own}, ValueError, "got Own; try"),
    ({"optimizer": lambda ps: torch.optim.SGD(ps, maximize=True)}, ValueError,
     "got maximize=True, which it ignores"),
    ({"optimizer": lambda ps: torch.optim.RMSprop(ps, centered=True)}, ValueError,
     "got centered=True, whose derivative is not a number"),
]  # fmt: skip
LEARNED = {"lr": torch.tensor(0.1, requires_grad=True)}


@pytest.mark.parametrize("cls, settings, kind, words", [
    *((cls, *row) for cls in CLASSES for row in SETTINGS),
    *((cls, *row) for cls in (UnrolledMAML, Reptile) for row in OPTIMIZERS),
    *((UnrolledMAML, *row) for row in NOT_BY_HIGHER),
    (Reptile, LEARNED, TypeError, "cannot be meta-learned"),
])  # fmt: skip
def test_settings(cls: type, settings: dict[str, Any], kind: type, words: str) -> None:
    assert words in message(lambda: cls(**{"model": head(), "lr": 0.1, **settings}), kind)


@pytest.mark.parametrize("settings", [row[0] for row in NOT_BY_HIGHER])
def test_reptile_takes_every_optimizer_and_its_original_no_outer_gradient(
    settings: dict[str, Any],
) -> None:
    text = message(Reptile(head(), 0.1, **settings).outer_gradient, RuntimeError)
    assert "expected an adapted clone" in text


@EVERY
@pytest.mark.parametrize("loss, steps, words", [
    (lambda learner: F.cross_entropy(learner(X), Y), 3, "steps: expected with a closure"),
    (lambda learner: lambda: 3.0, 2, "loss: expected a tensor, got float"),
    (lambda learner: X.clone().requires_grad_().sum(), None, "none of them"),
    (lambda learner: learner.module.weight.square().sum(), None,
     "1 of them do not enter; pass allow_unused=True"),
    (lambda learner: lambda: with_backward(learner), 2, "leave both to adapt()"),
    (lambda learner: setattr(learner, "first_order", "no") or learner(X).sum(), None,
     "first_order: expected True or False, got 'no'"),
])  # fmt: skip
def test_losses_and_flags(loss: Any, steps: int | None, words: str, cls: type) -> None:
    """And the learner is as it was; the same checks as of the implicit learners."""
    learner = cls(head(), 0.1).clone()
    before, given = list(learner.module.parameters()), loss(learner)
    assert words in message(lambda: learner.adapt(given, steps=steps))
    text = message(lambda: learner.clone(first_order="no"))
    assert text.startswith("first_order: expected True or False")
    assert all(a is b for a, b in zip(before, learner.module.parameters(), strict=True))


def with_backward(learner: Any) -> torch.Tensor:
    loss = F.cross_entropy(learner(X).tanh(), Y)
    loss.backward()
    return loss


@pytest.mark.parametrize("cls", [UnrolledMAML, Reptile])
def test_hidden_names(cls: type) -> None:
    with pytest.warns(UserWarning, match=r"called optimizer, .* use learner\.module\.optimizer"):
        learner = cls(Made(None, optimizer=nn.Linear(4, 3), encoder=nn.Linear(3, 3)), 0.1)
    assert learner.encoder is learner.module.encoder


@pytest.mark.parametrize("reached", ["", "features", "lr", "start", "first order", "test time"])
def test_an_inner_loop_that_reaches_nothing(reached: str) -> None:
    x = X.clone().requires_grad_(reached == "features")
    lr = torch.tensor(0.1, requires_grad=True) if reached == "lr" else 0.1
    settings = {"learn_init": reached == "start", "first_order": reached == "first order"}
    learner = UnrolledMAML(head(), lr, **settings).clone()
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(
        reached != "test time"
    ):
        warnings.simplefilter("always")
        learner.adapt(lambda: F.cross_entropy(learner(x), Y), steps=2)
    found = [str(w.message) for w in caught if "learn_init=True" in str(w.message)]
    assert len(found) == (reached == "")


@EVERY
def test_frozen_parameters_and_inference_mode(cls: type) -> None:
    module = head()
    learner = cls(module, 0.1).clone()
    with torch.inference_mode():
        text = message(lambda: learner.adapt(lambda: learner(X).sum(), steps=1), RuntimeError)
    assert "use torch.no_grad()" in text
    module.bias.requires_grad_(False)
    learner = cls(module, 0.1).clone()
    loss = F.cross_entropy(learner(X), Y)
    assert "got bias without" in message(lambda: learner.adapt(loss), ValueError)


def test_without_higher(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, and only where it is needed."""
    monkeypatch.setitem(sys.modules, "higher", None)
    text = message(lambda: UnrolledMAML(head(), 0.1), ImportError)
    assert "pip install l2l-implicit[baselines]" in text
    for cls in (Learn2LearnMAML, Reptile):
        learner = cls(head(), 0.1).clone()
        learner.adapt(lambda learner=learner: F.cross_entropy(learner(X), Y), steps=2)


def test_importing_the_package_imports_no_higher() -> None:
    code = "import sys, l2l_implicit, l2l_implicit.baselines; sys.exit('higher' in sys.modules)"
    assert run(["-c", code], Path.cwd()).returncode == 0
