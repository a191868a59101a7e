"""Which losses of linear heads are known, and what a learner makes of them: right either way."""

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit_from, linear, relative_error, solve
from problems import EXACT, Problem, error_where_it_ended, hypergradient, make_learner, two_layers
from small_task import HOWS, Made, adapt, nets
from torch import Tensor, nn
from verdict import judge

import l2l_implicit.learner as learner_module
from l2l_implicit import LBFGS, GradientDescent, ImplicitCGHead, Newton, UnsolvedWarning
from l2l_implicit.inner_problem.recognition import recognize

pytestmark = pytest.mark.usefixtures("float64")

M, WIDTH, CLASSES = 12, 4, 3
Y = torch.arange(M) % CLASSES
ROUNDING = 1e-13
SOLVED = 3  # a seed from which Newton's method reaches a minimum in a few steps
LINEAR = EXACT["linear"]


# Which losses are recognised, and that every answer is right either way

Net = Callable[[Tensor], Tensor]
Loss = Callable[[Net, Tensor], Tensor]  # of net and features
CE, MSE, EYE = F.cross_entropy, F.mse_loss, torch.eye(CLASSES, dtype=torch.float64)[Y]
NUMBERS = torch.linspace(-1, 1, M * CLASSES, dtype=torch.float64).view(M, CLASSES)
WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
ONES = torch.ones(WIDTH, CLASSES, dtype=torch.float64)


def spatial(net: Net, x: Tensor) -> Tensor:
    """Logits [batch, classes, places]: a two-dimensional kind of nll_loss."""
    return CE(net(x.view(4, 3, WIDTH)).transpose(1, 2), Y.view(4, 3))


def plain(net: Net, x: Tensor) -> Tensor:
    return CE(net(x), Y)


def strong(net: Net, x: Tensor) -> Tensor:
    return 4.0 * CE(net(x), Y)


CASES: dict[str, tuple[Loss, bool | None]] = {  # and whether the closed form is used
    "plain": (plain, True),
    "one example": (lambda net, x: CE(net(x[:1]), Y[:1]), True),
    "numbers": (lambda net, x: MSE(net(x), NUMBERS), True),
    "summed numbers": (lambda net, x: MSE(net(x), EYE, reduction="sum"), True),
    "ignored absent": (lambda net, x: CE(net(x), Y % 2, ignore_index=2), None),
    "smooth": (lambda net, x: CE(net(x), Y, label_smoothing=0.1), False),
    "weighted": (lambda net, x: CE(net(x), Y, weight=WEIGHTS), False),
    "ignored in range": (lambda net, x: CE(net(x), Y, ignore_index=1), False),
    "ignored in a sum": (lambda net, x: CE(net(x), Y, ignore_index=1, reduction="sum"), False),
    "three-dimensional": (lambda net, x: CE(net(x.view(4, 3, WIDTH)).flatten(0, 1), Y), False),
    "spatial": (spatial, False),
    "probabilities": (lambda net, x: CE(net(x), EYE * 0.7 + 0.1), False),
    "scaled loss": (lambda net, x: 0.5 * CE(net(x), Y), False),
    "scaled logits": (lambda net, x: CE(1.5 * net(x), Y), False),
    "softmax over the examples": (
        lambda net, x: F.nll_loss(F.log_softmax(net(x), dim=0), Y), False),
    "unbatched": (lambda net, x: CE(net(x[0]), Y[0]), False),
    "numbers first, another graph": (lambda net, x: MSE(EYE, net(x)), False),
    "targets of theta": (lambda net, x: MSE(net(x), torch.tanh(x @ ONES)), False),
    "targets of phi": (lambda net, x: MSE(net(x), 0.3 * net(x.roll(1, 0)) + EYE), False),
    "one column of numbers": (lambda net, x: MSE(net(x)[:, 0], EYE[:, 0]), False),
    "numbers, broadcast": (
        lambda net, x: MSE(net(x).expand(2, M, CLASSES), torch.stack([EYE, NUMBERS])), False),
}  # fmt: skip


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the closed form was used, each time that it was asked for."""
    found: list[bool] = []

    def spy(*args: Any) -> Any:
        parts = recognize(*args)
        found.append(parts is not None)
        return parts

    monkeypatch.setattr(learner_module, "recognize", spy)
    return found


def error_of(
    head: nn.Module, loss: Loss, how: str, steps: int = 20, outside: bool = False
) -> float:
    """Of the hypergradient, against the oracle's; ``outside``: not by the learner's forward."""
    backbone = torch.randn(5, WIDTH, requires_grad=True)
    data, query = torch.randn(M, 5), torch.randn(6, 1)

    def embed(theta: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x = torch.tanh(data @ theta["backbone"])
        return x, x[:6]

    task = Problem(
        "", head, {"backbone": backbone}, embed,
        lambda net, t, h: loss(net.module if outside and net is learner else net, h[0]),
        lambda net, t, h: (net(h[1]) * query).square().mean(), l2=0.2, lr=0.1,
    )  # fmt: skip
    learner = make_learner(task).clone()
    x, x_query = embed(task.theta)
    adapt(learner, lambda: task.support(learner, task.theta, (x, x_query)), how, steps)
    got = hypergradient(task, task.query(learner, task.theta, (x, x_query)))
    return error_where_it_ended(task, learner, got)


@HOWS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_every_loss_is_right(name: str, bias: bool, how: str, used: list[bool]) -> None:
    loss, closed = CASES[name]
    assert error_of(nn.Linear(WIDTH, CLASSES, bias), loss, how) < 1e-9
    assert closed is None or all(u is closed for u in used)


def tied() -> nn.Module:
    """Logits ``tanh(x W') W'``: one weight, twice."""
    return Made(lambda own, x: F.linear(torch.tanh(F.linear(x, own.weight)), own.weight),
                weight=nn.Parameter(torch.randn(WIDTH, WIDTH)))  # fmt: skip


@HOWS
@pytest.mark.parametrize("name, make, loss", [
    ("two layers", lambda: two_layers(2, 2.0), strong), ("tied", tied, strong),
    ("bypassing forward", lambda: nn.Linear(WIDTH, CLASSES), plain),
])  # fmt: skip
def test_what_is_not_taken_for_a_linear_head(
    name: str, make: Callable[[], nn.Module], loss: Loss, how: str, used: list[bool]
) -> None:
    torch.manual_seed(SOLVED)
    assert error_of(make(), loss, how, 40, outside="bypassing" in name) < 1e-8
    assert not any(used)


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "x @ w": lambda x, w, b: x @ w,
    "x.t().t() @ w.t()": lambda x, w, b: x.t().t() @ w.t(),
    "(w @ x.t()).t()": lambda x, w, b: (w @ x.t()).t(),
    "bias beta": lambda x, w, b: torch.addmm(b, x, w.t(), beta=2.0),
    "bias alpha": lambda x, w, b: torch.addmm(b, x, w.t(), alpha=3.0),
    "bias from w": lambda x, w, b: F.linear(x, w, w.sum(0) + b),
    "bias twice": lambda x, w, b: F.linear(x, w, b) + b,
    "w scaled, bias": lambda x, w, b: F.linear(x, 2 * w, b),
    "in place": lambda x, w, b: F.linear(x, w).mul_(2.0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_a_linear_map(spelling: str) -> None:
    weight, run = nn.Parameter(torch.randn(WIDTH, WIDTH)), SPELLINGS[spelling]
    bias = nn.Parameter(torch.randn(WIDTH)) if "bias" in spelling else None
    head = Made(lambda own, x: run(x, own.weight, own.bias), weight=weight, bias=bias)
    assert error_of(head, plain, "closure") < 1e-9


def biased(own: Any, x: Tensor) -> Tensor:
    """A linear map whose bias has a shape of its own; its mean where the samples are others."""
    rows = len(own.bias) if own.bias.dim() == 2 else 1
    bias = own.bias if rows in (1, len(x)) else own.bias.mean()
    return torch.addmm(bias, x, own.weight.t())


@HOWS
@pytest.mark.parametrize(
    "shape", [(), (1,), (1, CLASSES), (M, CLASSES), (M, 1), (CLASSES, 1)], ids=str
)
def test_biases_of_other_shapes(shape: tuple[int, ...], how: str, used: list[bool]) -> None:
    """``torch.addmm`` spreads them over the samples; only one number a class is a head's."""
    torch.manual_seed(SOLVED)
    m = M if shape != (CLASSES, 1) else CLASSES
    weight, bias = (nn.Parameter(torch.randn(s)) for s in ((CLASSES, WIDTH), shape))
    head = Made(biased, weight=weight, bias=bias)
    assert error_of(head, lambda net, x: CE(net(x[:m]), Y[:m]), how, 40) < 1e-8
    assert any(used) == (shape == (1, CLASSES))


@HOWS
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_features(layout: torch.layout, how: str, used: list[bool]) -> None:
    """Have no closed form, and are the dense ones all the same."""
    x, l2, found = torch.randn(M, WIDTH).relu(), torch.tensor(0.2, requires_grad=True), []
    module = nn.Linear(WIDTH, CLASSES)
    for features in (x, x.to_sparse(layout=layout)):
        learner = ImplicitCGHead(module, 0.1, l2=l2, **EXACT).clone()
        adapt(learner, lambda n=learner, x=features: CE(n(x), Y), how, 15)
        found += [learner(x), torch.autograd.grad(learner(x).square().sum(), l2)[0]]
    assert relative_error(found[:2], found[2:]) < 1e-9 and used[0] and not used[-1]


def test_no_features() -> None:
    """The bias alone."""
    l2 = torch.tensor(0.2, requires_grad=True)
    with pytest.warns(UserWarning, match="zero-element"):
        head = nn.Linear(0, CLASSES)
    learner, x = ImplicitCGHead(head, 0.1, l2=l2).clone(), torch.zeros(M, 0)
    learner.adapt(CE(learner(x), Y.clamp_max(1)))
    CE(learner(x), Y).backward()

    def inner(phi: Tensor, l2: Tensor) -> Tensor:
        return CE(phi.expand(M, -1), Y.clamp_max(1)) + 0.5 * l2 * phi.square().sum()

    outer = lambda phi, l2: CE(phi.expand(M, -1), Y)  # noqa: E731
    expected = implicit_from(inner, outer, torch.zeros(CLASSES), l2.detach())
    assert relative_error([l2.grad], [expected]) < 1e-9


def halve(gradient: Tensor) -> Tensor:
    return 0.5 * gradient


def halve_all(gradients: tuple[Tensor | None, ...], *_: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else 0.5 * g for g in gradients)


HOOKED: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {  # logits, log-probabilities, loss
    "outputs": lambda z, p, loss: z.register_hook(halve),
    "log-probabilities": lambda z, p, loss: p.register_hook(halve),
    "loss": lambda z, p, loss: loss.register_hook(halve),
    "the loss's node, before": lambda z, p, loss: loss.grad_fn.register_prehook(halve_all),
    "the logarithm's node": lambda z, p, loss: p.grad_fn.register_hook(halve_all),
}


@HOWS
@pytest.mark.parametrize("where", HOOKED)
@pytest.mark.parametrize("inside", [False, True])
def test_a_hook_is_obeyed(where: str, inside: bool, how: str, used: list[bool]) -> None:
    """It halves the loss's gradient: the minimum is that of half the loss. Autograd may call it
    again for the second derivative, which is no derivative then: that is warned of."""
    torch.manual_seed(SOLVED)
    x, query, l2 = torch.randn(M, WIDTH, requires_grad=True), torch.randn(M, WIDTH), 1.0

    def probabilities(net: Any, x: Tensor) -> Tensor:
        z = net(x)
        logs = F.log_softmax(z, 1)
        net.hooked = z, logs
        return logs

    head: nn.Module = nn.Linear(WIDTH, CLASSES)
    if inside:
        head = Made(lambda own, x: probabilities(own.part, x), part=head)
    learner = ImplicitCGHead(head, 0.3, l2=l2, inner=GradientDescent()).clone()

    def loss() -> Tensor:
        logs = learner(x) if inside else probabilities(learner, x)
        found = F.nll_loss(logs, Y)
        HOOKED[where](*(learner.module.part if inside else learner).hooked, found)
        return found

    def gradient() -> Tensor:
        adapt(learner, loss, how, 150)
        F.cross_entropy(learner(query), Y).backward()
        return x.grad.flatten()

    def half(phi: Tensor, x: Tensor) -> Tensor:
        out = linear(phi, x.view(M, WIDTH), CLASSES)
        return 0.5 * CE(out, Y) + 0.5 * l2 * phi.square().sum()

    zero = torch.zeros(CLASSES * (WIDTH + 1))
    outer = lambda phi, x: CE(linear(phi, query, CLASSES), Y)  # noqa: E731
    judge(gradient, implicit_from(half, outer, zero, x.detach().flatten()))
    expected = solve(lambda phi: half(phi, x.detach()), zero)
    assert relative_error([flat(learner.module.parameters())], [expected]) < 1e-9
    assert not any(used)


@pytest.mark.parametrize("where", ["loss", "log-probabilities", "squared error's outputs"])
def test_a_hook_that_comes_later_is_seen(where: str) -> None:
    """After the first call of a task, whose gradient is not compared again."""
    learner, x = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1).clone(), torch.randn(M, WIDTH)
    for hooked in (False, True):
        z = learner(x)
        logs = F.log_softmax(z, 1)
        loss = F.mse_loss(z, torch.zeros_like(z)) if "outputs" in where else F.nll_loss(logs, Y)
        if hooked:
            {"loss": loss, "log-probabilities": logs}.get(where, z).register_hook(halve)
        found = recognize(loss, [*learner.module.parameters()], set(), trusted=True)
        assert (found is None) == hooked


def test_a_hook_on_phi_is_seen_and_hooks_stay_the_users() -> None:
    learner, x = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1).clone(), torch.randn(M, WIDTH)
    phi, seen = [*learner.module.parameters()], list[float]()
    assert recognize(CE(learner(x), Y), phi, set()) is not None
    learner.module.weight.register_hook(lambda gradient: None)
    assert recognize(CE(learner(x), Y), phi, set()) is None
    outputs = learner(x)
    outputs.mul_(2.0)  # a hook is one on what the tensor then is
    outputs.register_hook(lambda gradient: seen.append(float(gradient.sum())))
    outputs.sum().backward()
    assert seen == [M * CLASSES]


@pytest.mark.parametrize("leaf", [False, True])
def test_learner_fed_its_own_weight(leaf: bool) -> None:
    """Inputs that are phi: the logits ``W W'`` are no linear map of W. Closures make W a leaf."""
    learner = ImplicitCGHead(nn.Linear(WIDTH, WIDTH, bias=False), 0.1, l2=0.5).clone()
    if leaf:
        learner.module.weight = nn.Parameter(learner.module.weight.detach())
    w, y = learner.module.weight, torch.arange(WIDTH)
    dense = torch.func.grad(lambda w: F.cross_entropy(w @ w.t(), y))(w.detach())
    assert recognize(F.cross_entropy(learner(w), y), [w], set()) is None
    learner.inner, learner.lr = GradientDescent(), 1.0
    learner.adapt(lambda: F.cross_entropy(learner(learner.module.weight), y), steps=1)
    moved = w.detach() - dense - 0.5 * w.detach()
    assert relative_error([learner.module.weight], [moved]) < ROUNDING


# The minimum at once, or steps in closed form.


DESCENT = {
    "gradient": {"inner": GradientDescent(), "linear": LINEAR},
    "adaptive": {"inner": GradientDescent(adaptive=True), "linear": LINEAR},
    "newton": {"inner": Newton(cg_steps=200, tol=1e-14), "linear": LINEAR},
    "lbfgs": {"inner": LBFGS(tol=1e-14), "linear": LINEAR},
}
# Newton and L-BFGS take other steps in closed form: these two meet at the minimum only.
RUNS = [*product(("gradient", "adaptive"), (1, 3)), ("lbfgs", 80), ("newton", 30)]


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [30, 5], ids=["few samples", "many samples"])
@pytest.mark.parametrize(("name", "steps"), RUNS)
@pytest.mark.parametrize("loss", [plain, lambda net, x: MSE(net(x), EYE)])
def test_the_steps_are_those_of_the_general_path(
    loss: Loss, name: str, steps: int, width: int, bias: bool, anchor: str
) -> None:
    """Phi, and the gradients of features, l2 and the initial weight and bias."""
    found: list[list[Any]] = []
    for known in (True, False):  # a product hides the closed form
        torch.manual_seed(1)
        features = torch.randn(2 * M, width).relu_().requires_grad_()
        l2 = torch.tensor(0.2, requires_grad=True)
        settings = {"l2": l2, "anchor": anchor, **DESCENT[name]}
        head = ImplicitCGHead(nn.Linear(width, CLASSES, bias=bias), 0.3, **settings)
        learner, h = head.clone(), features * 1.0

        def support(known=known, learner=learner, h=h) -> Tensor:
            return loss(learner, h[:M]) if known else loss(learner, h[:M]) * 1.0

        learner.adapt(support, steps=steps)
        plain(learner, h[M:]).backward()
        initial = [p.grad for p in head.module.parameters()]
        found.append([flat(learner.parameters()), features.grad, l2.grad, *initial])
    for value, other in zip(*found, strict=True):
        assert float((value - other).norm()) <= 1e-8 * float(other.norm()) + 1e-12


def solved() -> tuple[ImplicitCGHead, Tensor]:
    """A learner whose head Newton has solved, and its features."""
    h = torch.randn(M, WIDTH, requires_grad=True) * 1.0
    learner = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, anchor="init").clone()
    learner.adapt(F.cross_entropy(learner(h), Y))
    return learner, h


def test_a_changed_limit_is_the_one_that_counts() -> None:
    learner, h = solved()
    learner.max_error = 1e-30
    loss = F.cross_entropy(learner(h), Y)
    learner.adapt(loss)
    with pytest.warns(UnsolvedWarning, match="at most 1e-30"):
        F.cross_entropy(learner(h + 1.0), Y).backward()
    assert learner.diagnostics.unsolved == 1


def moved_anchor(learner: ImplicitCGHead, h: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        learner._task.initial[0].add_(1.0)
    return h, Y


CHANGES: dict[str, Callable[[ImplicitCGHead, Tensor], tuple[Tensor, Tensor]]] = {
    "nothing": lambda learner, h: (h, Y),
    "weights": lambda learner, h: (setattr(
        learner.module, "weight", nn.Parameter(2.0 * learner.module.weight.detach())) or h, Y),
    "anchor's values": moved_anchor,
    "l2": lambda learner, h: (setattr(learner, "l2", 0.7) or h, Y),
    "anchor": lambda learner, h: (setattr(learner, "anchor", "zero") or h, Y),
    "targets": lambda learner, h: (h, Y.roll(1)),
    "features": lambda learner, h: (h + 1.0, Y),
    "history": lambda learner, h: (h.detach().requires_grad_() * 1.0, Y),
    "no history": lambda learner, h: (h.detach(), Y),
    "fewer samples": lambda learner, h: (h[:-1], Y[:-1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_solved_anew(change: str) -> None:
    learner, h = solved()
    before = learner._task.saved().linearization
    h, y = CHANGES[change](learner, h)
    weights = list(learner.module.parameters())
    learner.adapt(F.cross_entropy(learner(h), y))
    at = learner._task.saved().linearization
    same = all(map(operator.is_, weights, learner.module.parameters()))
    assert (at is before and same) == (change == "nothing")
    assert at is not None and float(at.gradient_norm) < 1e-9
    assert torch.equal(at.point[0], flat(learner.module.parameters()))
    fresh = [p.detach().clone().requires_grad_() for p in learner.module.parameters()]
    initial = learner._task.initial if learner.anchor == "init" else [0.0, 0.0]
    loss = F.cross_entropy(F.linear(h.detach(), *fresh), y)
    squares = sum((p - a).square().sum() for p, a in zip(fresh, initial, strict=True))
    slopes = torch.autograd.grad(loss + 0.5 * float(learner.l2) * squares, fresh)
    assert all(float(slope.norm()) < 1e-9 for slope in slopes)
    assert len(at.sources()) == (change != "no history") + 2 * (learner.anchor == "init")
    if h.requires_grad:
        assert at.sources()[0] is h


@pytest.mark.parametrize("head, what", [
    ("linear", "features"), ("deep", "features"), ("linear", "targets"),
])  # fmt: skip
@HOWS
def test_features_overwritten_before_adapt_are_refused(how: str, head: str, what: str) -> None:
    """Torch notices that a saved tensor was overwritten: no silent wrong number."""
    h, y = torch.randn(6, 4).requires_grad_() * 1.0, Y[:6].clone()
    learner = ImplicitCGHead(nets()[head], 0.1).clone()

    def support() -> Tensor:
        loss = F.cross_entropy(learner(h), y)
        with torch.no_grad():
            (h if what == "features" else y).zero_()
        return loss

    with pytest.raises(RuntimeError, match="changed in place since; clone it first|clone what is"):
        adapt(learner, support, how, 1)


@pytest.mark.parametrize("how", ["loss", "closure", "together"])
@pytest.mark.parametrize("data, head", [
    ("features", "linear"), ("features", "deep"), ("features, unseen", "linear"),
    ("targets", "linear"),
])  # fmt: skip
def test_data_overwritten_after_adapt_are_those_of_adapt(data: str, how: str, head: str) -> None:
    """The learner holds copies: what is written to the originals later is of no matter."""
    theta, x, module = torch.randn(4, 4).requires_grad_(), torch.randn(6, 4), nets()[head]
    found = []
    for overwritten in (False, True) if (how, head) != ("together", "deep") else ():
        y, h = Y[:6].clone(), x @ theta
        learner = ImplicitCGHead(module, 0.1, l2=0.5).clone()
        if how == "together":
            adapted = learner.adapt_together(h[None], y[None])
        else:
            adapt(learner, lambda n=learner, h=h, y=y: F.cross_entropy(n(h), y), how, 8)
        if overwritten:
            {"features": h.mul_, "features, unseen": h.data.mul_, "targets": y.mul_}[data](0)
        outputs = adapted(x[None])[0] if how == "together" else learner(x)
        found.append(torch.autograd.grad(F.cross_entropy(outputs, Y[:6].roll(1)), theta))
    assert not found or relative_error(*found) < 1e-12


@HOWS
def test_data_changed_without_a_trace_are_refused_on_the_general_path(how: str) -> None:
    """There the graph is evaluated again in the backward pass, with what it finds."""
    x = torch.randn(M, WIDTH)
    learner = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, l2=torch.tensor(0.1).requires_grad_())
    learner = learner.clone()

    def support() -> Tensor:
        return (learner(x).square() * x[:, :CLASSES].exp()).mean()

    adapt(learner, support, how, 1)
    loss = learner(torch.ones(2, WIDTH)).square().sum()
    x.data.mul_(2.0)
    with pytest.raises(RuntimeError, match="another gradient when its graph was evaluated again"):
        loss.backward()


@pytest.mark.parametrize(("name", "times"), [("gradient", 2), ("newton", 1)])
def test_a_closure_that_returns_the_same_loss_is_called_seldom(name: str, times: int) -> None:
    calls, h = 0, torch.randn(M, WIDTH)
    learner = ImplicitCGHead(nn.Linear(WIDTH, CLASSES), 0.1, **DESCENT[name]).clone()

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        return F.cross_entropy(learner(h), Y)

    learner.adapt(closure, steps=20)
    assert calls == times


def drawing(
    learner: ImplicitCGHead, order: list[int], changes: str, factor: float | None = None
) -> Callable[[], Tensor]:
    """A closure with another batch at each call, as a minibatch or dropout has it."""
    generator, drawn = torch.Generator().manual_seed(3), iter(order)
    batches = torch.randn(8, M, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (8, M), generator=generator)

    def closure() -> Tensor:
        i = next(drawn)
        x, y = (i, 0) if changes == "features" else (0, i)
        value = F.cross_entropy(learner(batches[x]), labels[y])
        return value if factor is None else value * factor

    return closure


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("changes", ["features", "labels"])
@pytest.mark.parametrize("name", ["gradient", "adaptive"])
def test_a_closure_that_draws_anew_is_asked_at_every_step(changes: str, name: str) -> None:
    """The steps are those of the losses in their order."""
    module, results = nn.Linear(WIDTH, CLASSES), []
    # A product hides the closed form, for which there are two calls before the steps.
    # After them there is one, for the gradient at their end.
    for order, factor in (([6, 7, 0, 1, 2, 3, 4], None), ([0, 1, 2, 3, 4], 1.0)):
        learner = ImplicitCGHead(module, 0.3, l2=0.2, **DESCENT[name]).clone()
        with torch.no_grad():  # no comparison of derivatives, which asks for more
            learner.adapt(drawing(learner, order, changes, factor), steps=4)
        results.append(flat(learner.parameters()))
        assert learner._task.steps == 4
    assert torch.allclose(results[0], results[1], atol=1e-12)


@pytest.mark.parametrize("changes", ["features", "labels"])
def test_newton_solves_what_a_closure_computed_first(changes: str) -> None:
    module, weights = nn.Linear(WIDTH, CLASSES), []
    for order in ([0, 1], [0, 0]):
        learner = ImplicitCGHead(module, 0.1).clone()
        learner.adapt(drawing(learner, order, changes), steps=1)
        weights.append(learner.module.weight.detach())
    assert relative_error(weights[:1], weights[1:]) < 1e-12


def test_a_second_adapt_goes_on_from_the_first() -> None:
    module, h, ends = nn.Linear(WIDTH, CLASSES), torch.randn(M, WIDTH), []
    for pieces in ((6,), (2, 4), (1, 1, 4)):
        learner = ImplicitCGHead(module, 0.3, l2=0.2, inner=GradientDescent()).clone()
        for steps in pieces:
            learner.adapt(lambda n=learner: F.cross_entropy(n(h), Y), steps=steps)
        ends.append(flat(learner.parameters()))
        assert learner._task.steps == 6
    assert all(torch.allclose(ends[0], end, atol=1e-12) for end in ends[1:])
