"""What people stumble over who put a learner where learn2learn's MAML was: said in one line."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_implicit import GradientDescent, ImplicitCGHead, ImplicitMAML
from l2l_implicit.baselines import Learn2LearnMAML, UnrolledMAML

Y = torch.arange(9) % 3


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def inputs() -> Tensor:
    return torch.randn(9, 5, generator=torch.Generator().manual_seed(0))


def error_line(call: Callable[[], Any]) -> str:
    """The text of the error that a call ends in: one line, with what to do."""
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and "expected" in text and "; " in text
    return text


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The warnings of a test, as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        found: list[str] = []
        warnings.showwarning = lambda message, *_: found.append(str(message))  # type: ignore[assignment]
        yield found


@pytest.mark.parametrize("cls", [ImplicitCGHead, ImplicitMAML, Learn2LearnMAML, UnrolledMAML])
@pytest.mark.parametrize("which", ["whole", "part", "in place"])
def test_a_compiled_module(cls: type, which: str) -> None:
    net: nn.Module = network()
    if which == "whole":
        net = torch.compile(net, backend="eager")  # type: ignore[assignment]
    elif which == "part":
        net[1] = torch.compile(net[1], backend="eager")  # type: ignore[operator]
    else:
        net[1].compile(backend="eager")  # type: ignore[index]
    what = "the whole" if which == "whole" else "1"
    assert f"got {what} by torch.compile" in error_line(lambda: cls(net, 0.1))


def test_data_parallel() -> None:
    learner = nn.DataParallel(ImplicitMAML(network(), 0.1))
    assert "DataParallel" in error_line(learner.module._replicate_for_data_parallel)


@pytest.mark.parametrize("module", [nn.Linear(5, 3), network()], ids=["head", "network"])
def test_a_closure_that_calls_backward(module: nn.Module) -> None:
    learner, x = ImplicitMAML(module, 0.1).clone(), inputs().requires_grad_()

    def closure() -> Tensor:
        loss = F.cross_entropy(learner(x), Y)
        loss.backward()
        return loss

    before = [*learner.parameters()]
    assert "one that calls backward()" in error_line(lambda: learner.adapt(closure, steps=3))
    assert all(a is b for a, b in zip(before, learner.parameters(), strict=True))


def test_a_closure_without_steps() -> None:
    learner = ImplicitCGHead(nn.Linear(5, 3), 0.1).clone()
    text = error_line(lambda: learner.adapt(lambda: F.cross_entropy(learner(inputs()), Y)))
    assert "adapt(closure, steps=20)" in text


def test_an_empty_support_set() -> None:
    learner = ImplicitCGHead(nn.Linear(5, 3), 0.1).clone()
    text = error_line(lambda: learner.adapt(F.cross_entropy(learner(torch.empty(0, 5)), Y[:0])))
    assert "empty support set" in text


def test_many_frozen_parameters() -> None:
    net = nn.Sequential(*(nn.Linear(5, 5) for _ in range(50)), nn.Linear(5, 3))
    net[:50].requires_grad_(False)
    learner = ImplicitMAML(net, 0.1).clone()
    text = error_line(lambda: learner.adapt(F.cross_entropy(learner(inputs()), Y)))
    assert "got 0.weight, 0.bias, 1.weight and 97 more without" in text


def test_a_sparse_embedding() -> None:
    net = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(4, 3))
    learner, words = ImplicitMAML(net, 0.1).clone(), (torch.arange(9) % 7).unsqueeze(1)

    def loss() -> Tensor:
        return F.cross_entropy(learner(words), Y)

    assert "sparse=False" in error_line(lambda: learner.adapt(loss, steps=2))
    assert "sparse=False" in error_line(lambda: learner.adapt(loss()))


@pytest.mark.parametrize("inner", [{}, {"inner": GradientDescent()}], ids=["newton", "gradient"])
@pytest.mark.parametrize("closure", [False, True], ids=["losses", "closure"])
@pytest.mark.parametrize("cloned", [False, True], ids=["forgotten", "cloned"])
def test_a_forgotten_clone(
    inner: dict[str, Any], closure: bool, cloned: bool, warned: list[str]
) -> None:
    maml, x = ImplicitMAML(network(), 0.1, max_error=1e9, **inner), inputs()
    for _ in range(2):
        learner = maml.clone() if cloned else maml
        if closure:
            learner.adapt(lambda n=learner: F.cross_entropy(n(x), Y), steps=2)
        else:
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(x), Y))
        F.cross_entropy(learner(x), Y).backward()
    assert [text for text in warned if "call clone() first" in text] == warned
    assert len(warned) == (not cloned)


def test_the_learner_itself_may_be_adapted_when_all_is_done(warned: list[str]) -> None:
    maml, x = ImplicitMAML(network(), 0.1, max_error=1e9), inputs()
    learner = maml.clone()
    learner.adapt(lambda: F.cross_entropy(learner(x), Y), steps=2)
    F.cross_entropy(learner(x), Y).backward()
    for steps in (2, 3):
        maml.adapt(lambda: F.cross_entropy(maml(x), Y), steps=steps)
        maml.adapt(F.cross_entropy(maml(x), Y))
    assert not warned


class Named(nn.Module):
    """A model whose parts have names of the learner's."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor, self.l2 = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
        self.module, self.encoder = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("loss", torch.zeros(1))


@pytest.mark.parametrize("cls", [ImplicitCGHead, ImplicitMAML])
def test_hidden_names(cls: type, warned: list[str]) -> None:
    learner = cls(Named(), 0.1)
    (text,) = warned  # not of module, which learn2learn's MAML hides too
    assert "called anchor, l2, loss, which" in text and "use learner.module.anchor" in text
    assert isinstance(learner.module.anchor, nn.Linear) and learner.encoder is not None
    learner.clone()
    assert len(warned) == 1


@pytest.mark.parametrize("cls", [ImplicitCGHead, ImplicitMAML])
@pytest.mark.parametrize("closure", [False, True], ids=["losses", "closure"])
def test_an_adapted_learner_is_saved(cls: type, closure: bool) -> None:
    learner, x, file = cls(nn.Linear(5, 3), 0.1).clone(), inputs(), io.BytesIO()
    if closure:
        learner.adapt(lambda: F.cross_entropy(learner(x), Y), steps=5)
    else:
        learner.adapt(F.cross_entropy(learner(x), Y))
    torch.save(learner, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), learner(x))
    again.adapt(F.cross_entropy(again(x), Y))  # it is a learner still
    assert torch.isfinite(again(x)).all()


@pytest.mark.parametrize("reason", ["whole network", "detached", "no graph"])
def test_a_hypergradient_that_reaches_nothing(reason: str, warned: list[str]) -> None:
    x = inputs().requires_grad_(reason == "no graph")
    module = network() if reason == "whole network" else nn.Linear(5, 3)
    learner = ImplicitCGHead(module, 0.1, max_error=1e9, inner=GradientDescent()).clone()

    def loss() -> Tensor:
        logits = learner(x)
        if reason == "no graph":  # it depends on x, its gradient does not
            return logits.detach().sum() + sum(p.square().sum() for p in learner.parameters())
        return F.cross_entropy(logits, Y)

    learner.adapt(loss, steps=2)
    F.cross_entropy(learner(x), Y).backward()
    (text,) = [text for text in warned if "zero everywhere" in text]
    assert 'anchor="init"' in text and "ImplicitMAML" in text


@pytest.mark.parametrize("what", ["features", "anchor", "l2"])
def test_one_that_reaches_something(what: str, warned: list[str]) -> None:
    x = inputs().requires_grad_(what == "features")
    l2 = torch.tensor(0.1, requires_grad=True) if what == "l2" else 0.1
    anchor = "init" if what == "anchor" else "zero"
    learner = ImplicitCGHead(nn.Linear(5, 3), 0.1, l2=l2, anchor=anchor).clone()
    learner.adapt(F.cross_entropy(learner(x), Y))
    F.cross_entropy(learner(x), Y).backward()
    assert not warned
