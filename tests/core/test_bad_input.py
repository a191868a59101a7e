"""Bad input, and what people stumble over who put a learner where MAML was: said in one line."""

import copy
import io
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_task import HOWS, Made, Y, adapt, fit, message, network
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GaussNewton,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    LinearSolution,
    Neumann,
    Newton,
    Perturbed,
)
from l2l_implicit.baselines import UnrolledMAML

from learn2learn.utils import clone_module  # isort: skip

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def head(**settings: Any) -> ImplicitCGHead:
    return ImplicitCGHead(nn.Linear(4, 3), **{"lr": 0.1, **settings})


MODULES = pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), network], ids=["head", "net"])


def support(learner: Any, x: Tensor = X, y: Tensor = Y) -> Tensor:
    return F.cross_entropy(learner(x), y)


def trained(**settings: Any) -> ImplicitCGHead:
    """A clone that has taken one good step."""
    learner = head(**settings).clone()
    learner.adapt(support(learner))
    return learner


# Keywords of earlier versions: project/test_migration.py.
SETTINGS = [
    ("lr", 0.0, ValueError, "above 0"),
    ("lr", float("nan"), ValueError, "finite"),
    ("lr", "0.1", TypeError, "'0.1'"),
    ("lr", True, TypeError, "True"),
    ("lr", torch.tensor(0.1, requires_grad=True), TypeError, "meta-learned"),
    ("l2", -1e-9, ValueError, "at least 0"),
    ("l2", torch.ones(2), ValueError, "override regularizer"),
    ("l2", torch.tensor(0.1j), TypeError, "number"),
    ("anchor", "initial", ValueError, "did you mean 'init'"),
    ("anchor", None, ValueError, "'zero', 'init'"),
    ("inner", "newton", TypeError, "Newton()"),
    ("inner", Newton, TypeError, "Newton()"),
    ("inner", lambda at: at.point, TypeError, "begin(lr)"),
    ("inner", Perturbed(), TypeError, "begin(lr)"),
    ("linear", None, TypeError, "Direct()"),
    ("linear", CG, TypeError, "CG()"),
    ("curvature", "hessian", TypeError, "linearize"),
    ("curvature", GaussNewton, TypeError, "call the class"),
    ("max_error", -1.0, ValueError, "above 0"),
    ("accuracy", 0.0, ValueError, "above 0"),
    ("accuracy", "high", TypeError, "number"),
    ("loss", nn.CrossEntropyLoss(label_smoothing=0.1), ValueError, "adapt(closure)"),
    ("loss", nn.MSELoss(reduction="none"), ValueError, "mean or sum"),
    ("loss", F.cross_entropy, ValueError, "nn.CrossEntropyLoss"),
    ("l2", "0.1", TypeError, "'0.1'"),
    ("l2", True, TypeError, "True"),
    *((flag, value, TypeError, "True or False") for flag, value in (
        ("first_order", "no"), ("allow_unused", "no"), ("allow_nograd", None), ("warm_start", 2))),
]  # fmt: skip


@pytest.mark.parametrize("name, value, kind, hint", SETTINGS)
def test_settings(name: str, value: object, kind: type[Exception], hint: str) -> None:
    """In the constructor, and set later, on a clone too: the learner keeps what it has."""
    learner = head().clone()
    before = getattr(learner, name)
    for run in (lambda: head(**{name: value}), lambda: setattr(learner, name, value)):
        text = message(run, kind)
        assert text.startswith(name) and hint in text
    assert getattr(learner, name) is before


def test_settings_of_one_call() -> None:
    """Such as a number of steps where learn2learn has a flag."""
    learner = head().clone()
    assert "first_order" in message(lambda: learner.adapt(support(learner), 5), TypeError)
    assert "allow_nograd" in message(lambda: learner.clone(allow_nograd="no"), TypeError)


def test_a_setting_may_become_one_of_another_kind() -> None:
    """A number, a parameter with its gradient, a number again; another module with its anchor."""
    parent, l2 = head(anchor="init"), nn.Parameter(torch.tensor(0.3))
    for value in (l2, 0.3, torch.tensor([0.3]), l2):
        parent.l2 = value
        learner = parent.clone()
        learner.adapt(support(learner))
        support(learner, X.flip(0)).backward()
    assert parent.l2 is l2 and bool(l2.grad) and "l2" in dict(parent.named_parameters())
    other = nn.Linear(4, 3)
    fresh = ImplicitCGHead(copy.deepcopy(other), 0.1, anchor="init", l2=0.3)
    parent.module, parent.l2 = other, 0.3
    for learner in (parent, fresh):
        learner.adapt(support(learner))
    assert torch.equal(parent(X), fresh(X))
    assert "expected a torch.nn.Module" in message(lambda: setattr(parent, "module", nn.Linear))


def with_part(change: Callable[[nn.Module], Any]) -> Callable[[nn.Sequential], nn.Module]:
    return lambda net: nn.Sequential(net[0], change(net[1]), net[2])


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


BY = "by torch.compile, torch.jit or"
MAKES: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: CG(steps=0), ValueError, "CG: steps (N): expected at least 1"),
    (lambda: CG(steps=2.0), TypeError, "whole number"),
    (lambda: CG(damping=-1.0), ValueError, "CG: damping: expected a number of at least 0"),
    (lambda: Neumann(step_size=-1.0), ValueError, "Neumann: step_size: expected a number above 0"),
    (lambda: Direct(damping=float("nan")), ValueError, "finite"),
    (lambda: Newton(tol=-1.0), ValueError, "Newton: tol: expected a number above 0"),
    (lambda: GradientDescent(tol=0.0), ValueError, "GradientDescent: tol: expected a number above"),
    (lambda: LBFGS(history=0), ValueError, "LBFGS: history: expected at least 1"),
    (lambda: ImplicitMAML(nn.Linear(2, 2), 0.1, anchr="zero"), TypeError, "did you mean anchor?"),
    *((lambda m=m: ImplicitCGHead(m, 0.1), TypeError, "torch.nn.Module")
      for m in (None, nn.Linear, [nn.Linear(2, 2)])),
    # Modules that learn2learn's clone leaves without parameters or forward().
    *((lambda c=c, w=wrap: c(w(network()), 0.1), TypeError, f"got {what} {BY}")
      for c in (ImplicitMAML, UnrolledMAML) for wrap, what in (
        (compiled, "the whole"), (with_part(compiled), "1"),
        (with_part(lambda part: (part.compile(backend="eager"), part)[1]), "1"),
        (torch.jit.script, "the whole"), (lambda net: torch.jit.trace(net, X), "the whole"),
        (lambda net: nn.Sequential(torch.fx.symbolic_trace(net)), "0"))),
    (lambda: ImplicitMAML(nn.Linear(5, 3, dtype=torch.cfloat), 0.1), TypeError, "real parameters"),
    (lambda: head()._replicate_for_data_parallel(), TypeError, "DataParallel"),
    (lambda: ImplicitCGHead(nn.DataParallel(nn.Linear(3, 2)), 0.1), TypeError,
     "expected the module itself, got a DataParallel"),
    *((lambda c=c, m=m: c(m(), 0.1), ValueError, "run one batch through it first")
      for c in (ImplicitCGHead, UnrolledMAML) for m in (
        lambda: nn.LazyLinear(3), lambda: nn.Sequential(nn.LazyBatchNorm1d(affine=False)))),
]  # fmt: skip


@pytest.mark.parametrize("make, kind, hint", MAKES)
def test_methods_and_modules(make: Callable[[], object], kind: type[Exception], hint: str) -> None:
    assert hint in message(make, kind)


@pytest.mark.parametrize("value", [0, torch.tensor(0.0), torch.tensor([0.5]), np.float32(0.1)])
def test_settings_at_the_edge_are_accepted(value: object) -> None:
    assert head(l2=value).l2 is value
    learner = head(lr=np.float64(0.1), inner=Newton(np.int64(5)), linear=CG(np.int64(5))).clone()
    learner.adapt(lambda: support(learner), steps=np.int64(2))


def half_frozen() -> nn.Module:
    module = nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    return module


def many_frozen() -> nn.Module:
    frozen = nn.Sequential(*(nn.Linear(4, 4) for _ in range(50))).requires_grad_(False)
    return nn.Sequential(frozen, nn.Linear(4, 3))


def without_a_gradient(learner: Any) -> Tensor:
    """The loss is finite and its gradient is not: sqrt at zero."""
    outputs = learner(torch.zeros(2, 4) * learner.module.weight[0])
    return (outputs - learner.module.bias).square().sum().sqrt()


def freed(learner: Any) -> Tensor:
    loss = support(learner)
    torch.autograd.grad(loss, [*learner.parameters()])
    return loss


ONE = partial(nn.Linear, 4, 3)
LOSSES: list[tuple[Callable[[], nn.Module], Callable[[Any], Any], type[Exception], str]] = [
    (ONE, lambda learner: 3.0, TypeError, "expected a tensor"),
    (ONE, lambda learner: learner(X).sum(1), ValueError, r"shape \(6,\)"),
    (ONE, lambda learner: learner(X).sum() * 1j, ValueError, "torch.complex64"),
    (ONE, lambda learner: torch.tensor(1.0), ValueError, "graph"),
    (ONE, lambda learner: learner(X * float("nan")).sum(), ValueError, "finite"),
    (ONE, lambda learner: torch.ones(3, requires_grad=True).sum(), ValueError, "none of them"),
    (ONE, lambda learner: (X @ learner.module.weight.t()).square().sum(), ValueError,
     "allow_unused=True"),
    (ONE, without_a_gradient, FloatingPointError, ""),
    (ONE, lambda n: F.cross_entropy(n(X[:0]), Y[:0]), ValueError, "empty support set"),
    (ONE, freed, RuntimeError, "has freed"), (network, freed, RuntimeError, "has freed"),
    (half_frozen, support, ValueError, r"got bias without; .*allow_nograd=True"),
    (many_frozen, support, ValueError, r"got 0\.0\.weight, 0\.0\.bias, 0\.1\.weight and 97 more"),
    (nn.ReLU, lambda n: n(torch.ones(3, requires_grad=True)).sum(), ValueError, "none to adapt"),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).double()),
     lambda n: sum(p.sum() for p in n.parameters()), ValueError, "float32.*float64"),
    (lambda: nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(4, 3)),
     lambda n: F.cross_entropy(n(torch.arange(6).unsqueeze(1)), Y), TypeError, "sparse=False"),
]  # fmt: skip


@HOWS
@pytest.mark.parametrize("make, loss, kind, hint", LOSSES)
def test_losses(make: Callable, loss: Callable, kind: type[Exception], hint: str, how: str) -> None:
    """And the learner is as it was."""
    learner = ImplicitCGHead(make(), 0.1).clone()
    before = list(learner.module.parameters())
    text = message(lambda: adapt(learner, lambda: loss(learner), how, 2), kind)
    assert re.search(hint, text) and "\n" not in text
    assert all(a is b for a, b in zip(before, learner.module.parameters(), strict=True))


def test_losses_of_other_moments() -> None:
    """Of earlier parameters, without gradients, of first order; a wrong number of steps; with an
    l2 that an optimiser has made negative."""
    learner = head().clone()
    loss = support(learner)
    assert "closure" in message(lambda: learner.adapt(loss, steps=3), ValueError)
    learner.adapt(loss)
    assert "none of them" in message(lambda: learner.adapt(loss), ValueError)
    with torch.no_grad():
        loss = support(learner)
    assert "closure" in message(lambda: learner.adapt(loss), ValueError)
    fomaml = head(first_order=True).clone()
    assert "finite" in message(lambda: fomaml.adapt(fomaml(X * float("nan")).sum()), ValueError)
    for steps, hint in ((None, "adapt(closure, steps=20)"), (0, "steps (K)"), (1.5, "steps (K)")):
        text = message(lambda k=steps: learner.adapt(lambda: support(learner), steps=k))
        assert hint in text
    learner = head(l2=torch.tensor(0.1, requires_grad=True)).clone()
    learner.l2.data.fill_(-0.2)
    assert message(lambda: learner.adapt(support(learner)), ValueError).startswith("l2")


@HOWS
def test_query_gradient_not_finite(how: str) -> None:
    learner = trained()
    fit(learner, X, how, 2)
    query = learner(X * float("nan")).sum()
    assert "query loss" in message(query.backward, FloatingPointError)


def test_loss_of_superseded_parameters() -> None:
    learner = trained()
    stale = support(learner)
    learner.adapt(support(learner))  # the same problem: nothing is replaced
    stale.backward(retain_graph=True)
    learner.adapt(support(learner, y=Y.roll(1)))
    fresh = support(learner)
    for bad in (stale, fresh + stale):
        text = message(lambda loss=bad: loss.backward(retain_graph=True), RuntimeError)
        assert "second clone()" in text
    fresh.backward()


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "entries": lambda v: v[:, :-1], "rank": lambda v: v[0].clone(), "dtype": Tensor.half,
    "tasks": lambda v: v.expand(2, -1), "nothing": lambda v: None, "numbers": Tensor.tolist,
    "bare": torch.zeros_like,
}  # fmt: skip


@pytest.mark.parametrize("reason", WRONG)
@MODULES
def test_an_override_of_the_wrong_shape(make: Callable[[], nn.Module], reason: str) -> None:
    """Its mistake must not become a learner in an odd state."""

    class Step(ImplicitCGHead):
        def inner_step(self, at):
            return WRONG[reason](at.point)

    class Solve(ImplicitCGHead):
        def linear_solve(self, hvp, b, start):
            found, zeros = WRONG[reason](b), torch.zeros(1)
            bare = reason in ("nothing", "bare")  # no LinearSolution
            return found if bare else LinearSolution(found, zeros, zeros, [""])

    learner = Step(make(), 0.1).clone()
    if reason != "bare":
        text = message(lambda: learner.adapt(lambda: support(learner), steps=2), TypeError)
        assert text.startswith("inner step") and learner(X).shape == (6, 3)
    learner = Solve(make(), 0.1, max_error=1e9).clone()
    learner.adapt(lambda: support(learner), steps=2)
    loss = support(learner)
    assert "linear solver's solution" in message(loss.backward, TypeError)


@pytest.mark.parametrize("together", [False, True])
def test_modes_of_torch(together: bool) -> None:
    """None of them may lose what phi owes to theta."""
    learner = head().clone()

    def outer(scale: Tensor) -> Tensor:
        if together:
            return learner.adapt_together((scale * X)[None], Y[None])(X[None]).sum()
        clone = learner.clone()
        clone.adapt(lambda: support(clone, scale * X), steps=2)
        return support(clone)

    one = torch.ones(())
    assert "torch.autograd.grad" in message(lambda: torch.func.grad(outer)(one), RuntimeError)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(one, one)
        assert "forward mode" in message(lambda: outer(dual), RuntimeError)
    run = partial(torch.autograd.functional.jacobian, outer, one.expand(6, 1), vectorize=True)
    assert "one after the other" in message(run, RuntimeError)


def test_inference_mode() -> None:
    learner = head()
    with torch.inference_mode():
        made = learner.clone()
        assert "use torch.no_grad" in message(lambda: made.adapt(lambda: support(made), steps=2))
    assert "use torch.no_grad" in message(lambda: made.adapt(support(made), allow_unused=True))


def test_a_sparse_embedding_of_theta() -> None:
    """Beside the learner its gradient stays sparse, and is that of a dense one."""
    found, net = [], network()
    for sparse in (False, True):
        embedding = nn.Embedding(5, 3, sparse=sparse, _weight=torch.ones(5, 3))
        learner = ImplicitMAML(net, 0.1, inner=Newton(), linear=CG(100)).clone()
        learner.adapt(lambda n=learner, e=embedding: F.cross_entropy(n(X) + e(Y), Y), steps=30)
        support(learner).backward()
        assert embedding.weight.grad is not None and embedding.weight.grad.is_sparse == sparse
        found.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*found)


@MODULES
@pytest.mark.parametrize("cleans_up", [False, True])
def test_a_closure_that_calls_backward(make: Callable[[], nn.Module], cleans_up: bool) -> None:
    """Cleaned up or not: the loss's gradient in theta would stay in ``x.grad``."""
    learner, x = ImplicitMAML(make(), 0.1).clone(), X.clone().requires_grad_()

    def closure() -> Tensor:
        loss = support(learner, x)
        loss.backward(retain_graph=cleans_up)
        if cleans_up:
            learner.zero_grad()
        return loss

    before = [*learner.parameters()]
    assert "one that calls backward()" in message(lambda: learner.adapt(closure, steps=3))
    assert all(a is b for a, b in zip(before, learner.parameters(), strict=True))


# What is warned of.


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The warnings of a test, as they come."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        found: list[str] = []
        warnings.showwarning = lambda message, *_: found.append(str(message))  # type: ignore[assignment]
        yield found


@pytest.mark.parametrize("inner", [Newton(), GradientDescent()], ids=repr)
@HOWS
@pytest.mark.parametrize("cloned", [False, True], ids=["forgotten", "cloned"])
def test_a_forgotten_clone(inner: Any, how: str, cloned: bool, warned: list[str]) -> None:
    """In training; the learner itself may be adapted when all is done."""
    maml = ImplicitMAML(network(), 0.1, max_error=1e9, inner=inner)
    for _ in range(2):
        learner = maml.clone() if cloned else maml
        fit(learner, X, how, 2)
        support(learner).backward()
    if cloned:
        for _ in range(2):
            fit(maml, X, how, 2)
    assert [text for text in warned if "call clone() first" in text] == warned
    assert len(warned) == (not cloned)


def test_hidden_names(warned: list[str]) -> None:
    parts = {"anchor": nn.Linear(4, 3), "l2": nn.Parameter(torch.ones(3)),
             "module": nn.Linear(3, 3), "encoder": nn.Linear(3, 3)}  # fmt: skip
    model = Made(None, **parts)
    model.register_buffer("loss", torch.zeros(1))
    learner = ImplicitMAML(model, 0.1)
    (text,) = warned  # not of module, which learn2learn's MAML hides too
    assert "called anchor, l2, loss, which" in text and "use learner.module.anchor" in text
    assert isinstance(learner.module.anchor, nn.Linear) and learner.encoder is not None
    learner.clone()
    assert len(warned) == 1


def loaded(learner: Any) -> Any:
    file = io.BytesIO()
    torch.save(learner, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("cls", [ImplicitCGHead, ImplicitMAML])
@pytest.mark.parametrize("copied, gradients", [(loaded, True), (copy.deepcopy, False)])
@HOWS
def test_an_adapted_learner_is_copied(
    cls: type, copied: Callable[[Any], Any], gradients: bool, how: str, warned: list[str]
) -> None:
    """Its graph is not: a hypergradient that ends in it is warned of."""
    learner = cls(nn.Linear(4, 3), 0.1, inner=Newton()).clone()
    with torch.set_grad_enabled(gradients):
        fit(learner, X, how if gradients else "closure", 5)
    again = copied(learner)
    assert torch.equal(again(X), learner(X)) and not warned
    support(again).backward()
    assert len(warned) == 1 and "of a file or a deep copy" in warned[0]
    again.adapt(support(again))  # it is a learner still
    assert torch.isfinite(again(X)).all()


@pytest.mark.parametrize("inner", [Newton(), GradientDescent()], ids=repr)
@HOWS
@MODULES
def test_a_copy_by_learn2learn_is_a_learner_of_its_own(
    make: Callable[[], nn.Module], how: str, inner: Any
) -> None:
    """What either adapts to leaves the other, its graph and its steps as they were."""
    x, module, grads = X.clone().requires_grad_(), make(), []
    for copied in (False, True):
        learner = ImplicitMAML(module, 0.1, inner=inner, max_error=1e9).clone()
        fit(learner, x, how, 5)
        if copied:
            other = clone_module(learner)
            fit(other, 2.0 * x, how, 3)
            fit(clone_module(other), 3.0 * x, how, 2)
        support(learner, x.detach()).backward()
        assert learner.diagnostics.parent.hypergradients == 1
        grads.append(x.grad.clone())
        x.grad = None
    assert torch.equal(*grads)


@HOWS
@MODULES
def test_without_hooks_on_saved_tensors(make: Callable[[], nn.Module], how: str) -> None:
    """The graph has no place for what the backward pass needs; without a graph all is well."""
    learner = ImplicitMAML(make(), 0.1).clone()
    with disable_saved_tensors_hooks("none here"):
        text = message(lambda: fit(learner, X, how, 3), RuntimeError)
        assert "adapt outside of it" in text
        with torch.no_grad():
            fit(learner, X, "closure", 3)
    assert torch.isfinite(learner(X)).all()


REACHED = {"features": {}, "anchor": {"anchor": "init"}, "l2": {"l2": torch.tensor(0.1)}}
UNREACHED = ("whole network", "detached", "no graph")


@pytest.mark.parametrize("reason", [*UNREACHED, *REACHED])
def test_a_hypergradient_that_reaches_nothing(reason: str, warned: list[str]) -> None:
    """Is warned of; one that reaches features, anchor or l2 is not."""
    x = X.clone().requires_grad_(reason in ("no graph", "features"))
    module = network() if reason == "whole network" else nn.Linear(4, 3)
    settings = REACHED.get(reason, {"inner": GradientDescent()})
    for value in settings.values():
        if isinstance(value, Tensor):
            value.requires_grad_()
    learner = ImplicitCGHead(module, 0.1, max_error=1e9, **settings).clone()

    def loss() -> Tensor:
        logits = learner(x)
        if reason == "no graph":  # it depends on x, its gradient does not
            return logits.detach().sum() + sum(p.square().sum() for p in learner.parameters())
        return F.cross_entropy(logits, Y)

    learner.adapt(loss, steps=2)
    support(learner, x).backward()
    found = [text for text in warned if "zero everywhere" in text]
    assert len(found) == (reason in UNREACHED) and (found or not warned)
    assert all('anchor="init"' in text and "ImplicitMAML" in text for text in found)


def test_a_hypergradient_of_what_no_grad_has_adapted(warned: list[str]) -> None:
    """Theta would get the query loss's own gradient only; to adapt on is to adapt."""
    x, parent = X.clone().requires_grad_(), head()
    for _ in range(2):
        learner = parent.clone()
        with torch.no_grad():
            fit(learner, x, "closure", 5)
            support(learner, x)
        assert not warned[1:]
        support(learner, x).backward()
    assert len(warned) == 1 and "got those of an adapt() under torch.no_grad()" in warned[0]
    learner.adapt(support(learner, x))
    support(learner, x).backward()
    assert len(warned) == 1
