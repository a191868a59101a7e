"""Bad input, and what people stumble over who put a learner where MAML was: said in one line."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

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
    LinearSolution,
    Neumann,
    Newton,
)
from l2l_implicit.baselines import Learn2LearnMAML, UnrolledMAML

X, Y = torch.randn(6, 4), torch.arange(6) % 3


def head(**settings) -> ImplicitCGHead:
    return ImplicitCGHead(nn.Linear(4, 3), **{"lr": 0.1, **settings})


def trained(**settings) -> ImplicitCGHead:
    """A clone that has taken one good step."""
    learner = head(**settings).clone()
    learner.adapt(support(learner))
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
    ("l2", torch.tensor(True), TypeError, "number"),
    ("l2", torch.tensor(0.1j), TypeError, "number"),
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
    *(("accuracy", wrong, ValueError, "above 0") for wrong in (0.0, -1.0)),
    ("accuracy", float("nan"), ValueError, "finite"),
    *(("accuracy", wrong, TypeError, "number") for wrong in ("high", True)),
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
    learner.adapt(lambda: support(learner), steps=np.int64(2))


def nan_loss(learner: ImplicitCGHead) -> Tensor:
    return learner(X * float("nan")).sum()


LOSSES = [
    ("not a tensor", lambda learner: 3.0, TypeError, "tensor or a closure"),
    ("None", lambda learner: None, TypeError, "NoneType"),
    ("vector", lambda learner: learner(X).sum(1), ValueError, "shape (6,)"),
    ("complex", lambda learner: learner(X).sum() * 1j, ValueError, "torch.complex64"),
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
    loss = support(learner)
    assert "closure" in message(ValueError, lambda: learner.adapt(loss, steps=3))
    learner.adapt(loss)
    assert "none of them" in message(ValueError, lambda: learner.adapt(loss))
    with torch.no_grad():
        loss = support(learner)
    assert "closure" in message(ValueError, lambda: learner.adapt(loss))
    fomaml = head(first_order=True).clone()
    assert "finite" in message(ValueError, lambda: fomaml.adapt(nan_loss(fomaml)))


@pytest.mark.parametrize("steps, kind", [(0, ValueError), (-1, ValueError), (1.5, TypeError)])
def test_number_of_steps(steps: object, kind: type[Exception]) -> None:
    learner = trained()
    text = message(kind, lambda: learner.adapt(lambda: learner(X).square().sum(), steps=steps))
    assert text.startswith("steps (K)")


def support(learner: Any) -> Tensor:
    return F.cross_entropy(learner(X), Y)


def without_a_gradient(learner: Any) -> Tensor:
    """The loss is finite and its gradient is not: sqrt at zero."""
    outputs = learner(torch.zeros(2, 4) * learner.module.weight[0])
    return (outputs - learner.module.bias).square().sum().sqrt()


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def half_frozen() -> nn.Module:
    module = nn.Linear(4, 3)
    module.bias.requires_grad_(False)
    return module


def many_frozen() -> nn.Module:
    return nn.Sequential(frozen(nn.Sequential(*(nn.Linear(4, 4) for _ in range(50)))),
                         nn.Linear(4, 3))  # fmt: skip


Loss = Callable[[Any], Tensor]
ODD: list[tuple[Callable[[], nn.Module], Loss, type[Exception], str]] = [  # and what is said
    (half_frozen, support, ValueError, r"got bias without; .*allow_nograd=True"),
    (many_frozen, support, ValueError, r"got 0\.0\.weight, 0\.0\.bias, 0\.1\.weight and 97 more"),
    (nn.ReLU, lambda n: n(torch.ones(3, requires_grad=True)).sum(), ValueError, ""),
    (lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3).double()),
     lambda n: sum(p.sum() for p in n.parameters()), ValueError, "float32.*float64"),
    (lambda: nn.Linear(4, 3), without_a_gradient, FloatingPointError, ""),
    (lambda: nn.Linear(4, 3), lambda n: F.cross_entropy(n(X[:0]), Y[:0]), ValueError,
     "empty support set"),
    (lambda: nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(4, 3)),
     lambda n: F.cross_entropy(n(torch.arange(6).unsqueeze(1)), Y), TypeError, "sparse=False"),
]  # fmt: skip


@HOWS
@pytest.mark.parametrize("make, loss, kind, hint", ODD)
def test_modules_and_losses_that_cannot_be(
    make: Callable[[], nn.Module], loss: Loss, kind: type[Exception], hint: str, how: str
) -> None:
    module = make()
    learner = ImplicitCGHead(module, 0.1, allow_nograd=isinstance(module, nn.ReLU)).clone()
    assert re.search(hint, message(kind, lambda: adapt(learner, lambda: loss(learner), how, 2)))


@HOWS
def test_query_gradient_not_finite(how: str) -> None:
    learner = trained()
    adapt(learner, lambda: support(learner), how, 2)
    query = learner(X * float("nan")).sum()
    assert "query loss" in message(FloatingPointError, query.backward)


def test_loss_of_superseded_parameters() -> None:
    learner = trained()
    stale = support(learner)
    learner.adapt(support(learner))  # the same problem: nothing is replaced
    stale.backward(retain_graph=True)
    learner.adapt(F.cross_entropy(learner(X), Y.roll(1)))
    fresh = support(learner)
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
    text = message(ValueError, lambda: learner.adapt(support(learner)))
    assert text.startswith("l2")


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "entries": lambda v: v[:, :-1], "rank": lambda v: v[0].clone(), "dtype": Tensor.half,
    "tasks": lambda v: v.expand(2, -1), "nothing": lambda v: None, "numbers": Tensor.tolist,
    "bare": torch.zeros_like,
}  # fmt: skip
LAYERS = [lambda: nn.Linear(4, 3), lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))]


@pytest.mark.parametrize("reason", [reason for reason in WRONG if reason != "bare"])
@pytest.mark.parametrize("make", LAYERS, ids=["head", "network"])
def test_inner_step_of_the_wrong_shape(make: Callable[[], nn.Module], reason: str) -> None:
    """An override's mistake must not become a learner in an odd state."""

    class Wrong(ImplicitCGHead):
        def inner_step(self, at):
            return WRONG[reason](at.point)

    learner = Wrong(make(), 0.1).clone()
    text = message(TypeError, lambda: learner.adapt(lambda: support(learner), steps=2))
    assert text.startswith("inner step") and learner(X).shape == (6, 3)


@pytest.mark.parametrize("reason", WRONG)
@pytest.mark.parametrize("make", LAYERS, ids=["head", "network"])
def test_linear_solve_of_the_wrong_shape(make: Callable[[], nn.Module], reason: str) -> None:
    class Wrong(ImplicitCGHead):
        def linear_solve(self, hvp, b, start):
            found, zeros = WRONG[reason](b), torch.zeros(1)
            bare = reason in ("nothing", "bare")  # no LinearSolution
            return found if bare else LinearSolution(found, zeros, zeros, [""])

    learner = Wrong(make(), 0.1, max_error=1e9).clone()
    learner.adapt(lambda: support(learner), steps=2)
    loss = support(learner)
    assert "linear solver's solution" in message(TypeError, loss.backward)


def test_a_transform_of_functorch() -> None:
    learner = head()

    def outer(scale: Tensor) -> Tensor:
        clone = learner.clone()
        clone.adapt(lambda: F.cross_entropy(clone(scale * X), Y), steps=2)
        return F.cross_entropy(clone(X), Y)

    assert "torch.autograd.grad" in message(
        RuntimeError, lambda: torch.func.grad(outer)(torch.ones(()))
    )


def test_a_sparse_embedding_of_theta() -> None:
    """Beside the learner its gradient stays sparse, and is that of a dense one."""
    found, network = [], nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    for sparse in (False, True):
        embedding = nn.Embedding(5, 3, sparse=sparse, _weight=torch.ones(5, 3))
        learner = ImplicitMAML(network, 0.1, inner=Newton(), linear=CG(100)).clone()
        learner.adapt(lambda n=learner, e=embedding: F.cross_entropy(n(X) + e(Y), Y), steps=30)
        support(learner).backward()
        assert embedding.weight.grad is not None and embedding.weight.grad.is_sparse == sparse
        found.append(embedding.weight.grad.to_dense())
    torch.testing.assert_close(*found)


def test_inference_mode_is_refused_with_the_mode_to_use() -> None:
    learner = head().clone()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="use torch.no_grad"):
        learner.adapt(lambda: learner(torch.ones(2, 4)).sum(), steps=2)


# In the place of learn2learn's MAML.


NINE = torch.arange(9) % 3


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


@pytest.mark.parametrize("cls", [ImplicitMAML, UnrolledMAML])
@pytest.mark.parametrize("wrap", [
    torch.jit.script, lambda net: torch.jit.trace(net, inputs()), torch.fx.symbolic_trace,
])  # fmt: skip
def test_a_module_made_by_a_compiler(cls: type, wrap: Callable[..., nn.Module]) -> None:
    """learn2learn's clone of it has no parameters, or no forward()."""
    for net, what in ((wrap(network()), "the whole"), (nn.Sequential(wrap(network())), "0")):
        assert f"got {what} by torch.compile, torch.jit or" in error_line(lambda n=net: cls(n, 0.1))


@pytest.mark.parametrize("cls", [ImplicitCGHead, ImplicitMAML])
def test_complex_parameters(cls: type) -> None:
    assert "real parameters" in error_line(lambda: cls(nn.Linear(5, 3, dtype=torch.cfloat), 0.1))


def test_data_parallel() -> None:
    learner = nn.DataParallel(ImplicitMAML(network(), 0.1))
    assert "DataParallel" in error_line(learner.module._replicate_for_data_parallel)


EACH_MODULE = pytest.mark.parametrize(
    "module", [nn.Linear(5, 3), network()], ids=["head", "network"]
)


@EACH_MODULE
@pytest.mark.parametrize("cleans_up", [False, True])
def test_a_closure_that_calls_backward(module: nn.Module, cleans_up: bool) -> None:
    """Cleaned up or not: the loss's gradient in theta would stay in ``x.grad``."""
    learner, x = ImplicitMAML(module, 0.1).clone(), inputs().requires_grad_()

    def closure() -> Tensor:
        loss = F.cross_entropy(learner(x), NINE)
        loss.backward(retain_graph=cleans_up)
        if cleans_up:
            learner.zero_grad()
        return loss

    before = [*learner.parameters()]
    assert "one that calls backward()" in error_line(lambda: learner.adapt(closure, steps=3))
    assert all(a is b for a, b in zip(before, learner.parameters(), strict=True))


@EACH_MODULE
@HOWS
def test_a_graph_that_has_been_freed(module: nn.Module, how: str) -> None:
    learner = ImplicitMAML(module, 0.1).clone()

    def closure() -> Tensor:
        loss = F.cross_entropy(learner(inputs()), NINE)
        torch.autograd.grad(loss, [*learner.parameters()])
        return loss

    assert "has freed" in error_line(lambda: adapt(learner, closure, how, 3))


@EACH_MODULE
@pytest.mark.parametrize("what", ["features", "targets"])
def test_data_changed_before_adapt(module: nn.Module, what: str) -> None:
    learner, x, y = ImplicitMAML(module, 0.1).clone(), inputs(), NINE.clone()
    loss = F.cross_entropy(learner(x), y)
    (x if what == "features" else y).zero_()
    assert "clone what is changed" in error_line(lambda: learner.adapt(loss))


def test_a_closure_without_steps() -> None:
    learner = ImplicitCGHead(nn.Linear(5, 3), 0.1).clone()
    text = error_line(lambda: learner.adapt(lambda: F.cross_entropy(learner(inputs()), NINE)))
    assert "adapt(closure, steps=20)" in text


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
            learner.adapt(lambda n=learner: F.cross_entropy(n(x), NINE), steps=2)
        else:
            for _ in range(2):
                learner.adapt(F.cross_entropy(learner(x), NINE))
        F.cross_entropy(learner(x), NINE).backward()
    assert [text for text in warned if "call clone() first" in text] == warned
    assert len(warned) == (not cloned)


def test_the_learner_itself_may_be_adapted_when_all_is_done(warned: list[str]) -> None:
    maml, x = ImplicitMAML(network(), 0.1, max_error=1e9), inputs()
    learner = maml.clone()
    learner.adapt(lambda: F.cross_entropy(learner(x), NINE), steps=2)
    F.cross_entropy(learner(x), NINE).backward()
    for steps in (2, 3):
        maml.adapt(lambda: F.cross_entropy(maml(x), NINE), steps=steps)
        maml.adapt(F.cross_entropy(maml(x), NINE))
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
        learner.adapt(lambda: F.cross_entropy(learner(x), NINE), steps=5)
    else:
        learner.adapt(F.cross_entropy(learner(x), NINE))
    torch.save(learner, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), learner(x))
    again.adapt(F.cross_entropy(again(x), NINE))  # it is a learner still
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
        return F.cross_entropy(logits, NINE)

    learner.adapt(loss, steps=2)
    F.cross_entropy(learner(x), NINE).backward()
    (text,) = [text for text in warned if "zero everywhere" in text]
    assert 'anchor="init"' in text and "ImplicitMAML" in text


def test_a_hypergradient_of_what_no_grad_has_adapted(warned: list[str]) -> None:
    """Theta would get the query loss's own gradient only; to adapt on is to adapt."""
    x, parent = inputs().requires_grad_(), ImplicitCGHead(nn.Linear(5, 3), 0.1)
    for _ in range(2):
        learner = parent.clone()
        with torch.no_grad():
            adapt(learner, lambda head=learner: F.cross_entropy(head(x), NINE), "closure", 5)
            F.cross_entropy(learner(x), NINE)
        assert not warned[1:]
        F.cross_entropy(learner(x), NINE).backward()
    assert len(warned) == 1 and "got those of an adapt() under torch.no_grad()" in warned[0]
    learner.adapt(F.cross_entropy(learner(x), NINE))
    F.cross_entropy(learner(x), NINE).backward()
    assert len(warned) == 1


@pytest.mark.parametrize("what", ["features", "anchor", "l2"])
def test_one_that_reaches_something(what: str, warned: list[str]) -> None:
    x = inputs().requires_grad_(what == "features")
    l2 = torch.tensor(0.1, requires_grad=True) if what == "l2" else 0.1
    anchor = "init" if what == "anchor" else "zero"
    learner = ImplicitCGHead(nn.Linear(5, 3), 0.1, l2=l2, anchor=anchor).clone()
    learner.adapt(F.cross_entropy(learner(x), NINE))
    F.cross_entropy(learner(x), NINE).backward()
    assert not warned
