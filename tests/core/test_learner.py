"""What the learners do beyond learn2learn's contract: first order, memory, odd modules."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from problems import EXACT
from small_task import HOWS, Y, adapt, fit, nets, x
from torch import Tensor, nn

from l2l_implicit import CG, LBFGS, GradientDescent, ImplicitCGHead, ImplicitMAML, Newton

from learn2learn.algorithms import MAML  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = pytest.mark.usefixtures("float64")
PLACES = ("constructor", "clone", "adapt")


@pytest.mark.parametrize("name", list(nets()))
@pytest.mark.parametrize("where", PLACES)
@HOWS
def test_first_order_is_exactly_learn2learns(how: str, name: str, where: str) -> None:
    torch.manual_seed(1)
    module, theta, data = nets()[name], torch.randn(4, 4, requires_grad=True), x()
    flags = {place: {"first_order": True} if place == where else {} for place in PLACES}
    ours = ImplicitCGHead(copy.deepcopy(module), 0.3, **flags["constructor"])
    found = []
    for parent, given in ((MAML(module, 0.3, first_order=True), {}), (ours, flags)):
        learner, h = parent.clone(**given.get("clone", {})), torch.tanh(data @ theta)

        def loss(learner=learner, h=h, y=Y) -> Tensor:
            return F.cross_entropy(learner(h), y)

        if parent is ours and how == "closure":
            learner.adapt(loss, steps=4, **flags["adapt"])
        else:
            for _ in range(4):
                learner.adapt(loss(), **given.get("adapt", {}))
        theta.grad = None
        loss(y=Y.roll(1)).backward()
        grads = [p.grad for p in parent.parameters()]
        found.append([*learner.module.parameters(), *grads, theta.grad, *learner.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@HOWS
@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_without_a_clone(how: str, anchor: str) -> None:
    """The parent itself adapts: its first parameters are still the initial value."""
    inputs, grads = x(), []
    module = nn.Linear(4, 3)
    for cloned in (False, True):
        parent = ImplicitCGHead(copy.deepcopy(module), 0.1, anchor=anchor, **EXACT)
        initial = list(parent.module.parameters())
        learner = parent.clone() if cloned else parent
        fit(learner, inputs, how)
        learner(inputs).square().sum().backward()
        grads.append([p.grad for p in initial])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


@HOWS
def test_unused_parameters_go_to_their_anchor(how: str) -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)})
    parent = ImplicitCGHead(module, 0.1, allow_unused=True, anchor="init")
    learner, inputs = parent.clone(), x()

    def loss() -> Tensor:
        return F.cross_entropy(learner.module["used"](inputs), Y)

    for _ in range(5):
        adapt(learner, loss, how, 1)
    idle, before = learner.module["idle"], parent.module["idle"]
    assert torch.equal(idle.weight, before.weight)
    (loss() + idle.weight.sum()).backward()
    assert torch.allclose(before.weight.grad, torch.ones(2, 2), rtol=1e-3)


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_batch_norm_may_be_adapted_by_a_closure() -> None:
    """The look at the second derivative puts running statistics back as if it had not been."""
    network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    maml, inputs = ImplicitMAML(network, 0.1), x()
    passes = []
    for _ in range(2):  # it looks at the first task alone
        learner = maml.clone()
        learner.adapt(lambda learner=learner: F.cross_entropy(learner(inputs), Y), steps=1)
        passes.append(int(learner.module[1].num_batches_tracked))
        F.cross_entropy(learner(inputs), Y).backward()
    assert passes == [2, 5] and network[0].weight.grad.norm() > 0  # two, the query, two more


# What counts as theta, however it gets into the inner loss.


class Inputs(dict):
    """A dict with an attribute, as model libraries pass them about."""

    main = property(lambda self: self["main"])


class Nested(nn.Linear):
    """Features in nested arguments."""

    def forward(self, inputs: Any, *, scale: dict[str, Tensor] | None = None) -> Tensor:
        return super().forward(inputs if scale is None else inputs.main[0] * scale["value"])


class Named(torch.autograd.Function):
    """Someone's own function, whose node has an attribute that torch's leaves have too."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.variable = torch.zeros(1)
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class WithFeatures(nn.Linear):
    """Gives its features back."""

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(h), h


CE = F.cross_entropy
OTHER = ImplicitCGHead(nn.Linear(4, 4, dtype=torch.float64), 0.1).clone()


def plain(net: Any, h: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    return CE(net(h * scale), y)


def nested(net: Any, h: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    return CE(net(Inputs(main=[h]), scale={"value": scale}), y)


def asked_before(net: Any, h: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    loss = plain(net, h, scale, y)
    if loss.requires_grad:
        torch.autograd.grad(loss, h, retain_graph=True)
    return loss


def twice(net: Any, h: Tensor, y: Tensor, returned: bool = False) -> Tensor:
    out, again = net(h)
    again = again if returned else h
    return CE(net(again.sin())[0], y) + F.mse_loss(out, again[:, :3].tanh())


def penalised(learner: Any, net: Any, h: Tensor, y: Tensor) -> Tensor:
    """By a gradient of what ``net`` makes of the inputs."""
    slopes = torch.func.vmap(torch.func.grad(lambda row: net(row).tanh().square().sum()))(h)
    return CE(learner(h), y) + 0.3 * slopes.square().mean()


# The head; a loss of the learner, features, a scale and targets; the same without what is unusual.
Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]
CASES: dict[str, tuple[type[nn.Linear], Loss, Loss]] = {
    "nested inputs": (Nested, nested, plain),
    "nested inputs of the module": (Nested, lambda n, *rest: nested(n.module, *rest), plain),
    "a function of one's own": (
        nn.Linear, lambda n, h, s, y: plain(n.module, Named.apply(h), s, y), plain),
    "the features' gradient asked before": (nn.Linear, asked_before, plain),
    "a first-order learner": (nn.Linear, plain, plain),
    # An input behind another input counts once.
    "another learner": (WithFeatures, lambda n, h, s, y: twice(n, OTHER(h * s), y),
                        lambda n, h, s, y: twice(n, OTHER.module(h * s), y)),
    "returned features": (WithFeatures, lambda n, h, s, y: twice(n, h * s, y, True),
                          lambda n, h, s, y: twice(n, h * s, y)),
    "transforms of functions": (nn.Linear, lambda n, h, s, y: penalised(n, n, h * s, y),
                                lambda n, h, s, y: penalised(n, n.module, h * s, y)),
}  # fmt: skip


@HOWS
@pytest.mark.parametrize("case", CASES)
def test_theta_in_unusual_company(case: str, how: str) -> None:
    """Features and a scale: their gradients are those of the plain call."""
    theta, data, (kind, unusual, usual) = torch.randn(4, 4), x(), CASES[case]
    head, grads = kind(4, 3), []
    for run in (unusual, usual):
        leaves = [theta.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)]
        h, scale = torch.tanh(data @ leaves[0]), leaves[1] * 1.0
        first_order = not grads and case == "a first-order learner"
        learner = ImplicitCGHead(head, 0.1, first_order, **EXACT).clone()

        def loss(run=run, learner=learner, h=h, scale=scale) -> Tensor:
            return run(learner, h, scale, Y)

        for _ in range(12):
            given = {"loss": loss, "steps": 1} if how == "closure" else {"loss": loss()}
            learner.adapt(**given, first_order=False)
        grads.append(torch.autograd.grad(run(learner, h, scale, Y.roll(1)), leaves))
    assert relative_error(*grads) < 1e-9


@HOWS
def test_a_hook_of_theta_is_called_once(how: str) -> None:
    grads, head, inputs = [], nn.Linear(4, 3), x()
    for factor in (1.0, 10.0):
        temperature = torch.full((1,), 0.3, requires_grad=True)
        temperature.register_hook(lambda gradient, factor=factor: factor * gradient)
        learner = ImplicitCGHead(head, 0.1, **EXACT).clone()

        def loss(learner=learner, temperature=temperature) -> Tensor:
            return F.cross_entropy(learner(inputs) * temperature.exp(), Y)

        adapt(learner, loss, how, 12)
        F.cross_entropy(learner(inputs), Y.roll(1)).backward()
        grads.append(temperature.grad / factor)
    assert relative_error(*grads) < 1e-9


def test_gradients_that_are_asked_for_can_be_written_to() -> None:
    """Also those that are zero, of the initial value; T tasks alike."""
    head, h = ImplicitCGHead(nn.Linear(4, 3), 0.1), x().requires_grad_()
    learner = head.clone()
    fit(learner, h)
    alone = F.cross_entropy(learner(h), Y), [h, *head.parameters()]
    both = torch.stack([h, 2 * h])
    adapted = head.adapt_together(both, Y.expand(2, 6))
    together = adapted(both).square().sum(), [h, *head.parameters()]
    for loss, sources in (alone, together):
        for gradient in torch.autograd.grad(loss, sources):
            gradient.mul_(2.0)


@pytest.mark.parametrize(
    ("factor", "fatal", "inner"),
    [(None, 1, Newton()), (None, 2, GradientDescent()), (1.0, 3, Newton())],
)
def test_an_exception_in_a_closure_leaves_the_learner_as_it_was(
    factor: float | None, fatal: int, inner: Any
) -> None:
    """Also its hypergradient: what it had before is what it has after. A factor hides the closed
    form, whose closure is called once or twice only."""
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, anchor="init", inner=inner, max_error=1e9)
    inputs = x()
    grads = []
    for fails in (False, True):
        learner, calls = parent.clone(), []
        fit(learner, inputs, "closure")
        before, steps = list(learner.module.parameters()), learner._task.steps

        def broken(learner=learner, calls=calls) -> Tensor:
            calls.append(1)
            if len(calls) == fatal:
                raise KeyError("data")
            loss = F.cross_entropy(learner(inputs), Y.roll(1))
            return loss if factor is None else factor * loss

        if fails:
            with pytest.raises(KeyError):
                learner.adapt(broken, steps=5)
        assert all(a is b for a, b in zip(before, learner.module.parameters(), strict=True))
        assert learner._task.steps == steps
        loss = F.cross_entropy(learner(inputs), Y)
        grads.append(torch.autograd.grad(loss, list(parent.module.parameters())))
    assert relative_error(*grads) < 1e-9


# A task named at `clone` goes on from where it ended.


UNFACTORED = {"inner": LBFGS(tol=1e-13), "linear": CG(steps=200, tol=1e-13)}  # no factor: v is used


def visit(parent: ImplicitCGHead, inputs: Tensor, steps: int, **key: str) -> ImplicitCGHead:
    learner = parent.clone(**key)
    learner.adapt(lambda: F.cross_entropy(learner(inputs), Y), steps=steps)
    F.cross_entropy(learner(inputs), Y.roll(1)).backward()
    return learner


@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_warm_start_continues_where_the_task_ended(anchor: str) -> None:
    """And does not move the hypergradient; it may be switched on and off."""
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, anchor=anchor, **UNFACTORED)
    parent.warm_start = True
    inputs = x().requires_grad_()
    first = visit(parent, inputs, 20, task="a")
    leaves = [inputs, *(parent.parameters() if anchor == "init" else [])]
    grads = [p.grad.clone() for p in leaves]
    second = parent.clone(task="a")
    assert torch.equal(second.module.weight, first.module.weight)
    second = visit(parent, inputs, 1, task="a")
    assert relative_error([p.grad for p in leaves], [2 * g for g in grads]) < 1e-9
    assert second.diagnostics.cg_steps < first.diagnostics.cg_steps
    assert second.diagnostics.unsolved_inner == second.diagnostics.unsolved_linear == 0
    others = [parent.clone(), parent.clone(task="b"), parent.clone(task=None)]
    parent.warm_start = False
    for other in (*others, parent.clone(task="a")):
        assert torch.equal(other.module.weight, parent.module.weight)


def test_a_warm_start_of_other_parameters_is_a_fresh_one() -> None:
    """Of another number, precision, or closed form than at the last visit."""
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True, allow_nograd=True, **UNFACTORED)
    inputs, known = x(), True

    def found(learner: ImplicitCGHead) -> Tensor:
        z = inputs.to(learner.module.weight.dtype)
        loss = lambda: F.cross_entropy(learner(z) if known else learner(z) * 1.0, Y)  # noqa: E731
        learner.adapt(loss, steps=30)
        F.cross_entropy(learner(z), Y.roll(1)).backward()
        return learner(z).double()

    for change in (lambda: parent.module.bias.requires_grad_(False), parent.float, parent.double):
        found(parent.clone(task="a"))
        change()
        known = not known
        assert relative_error([found(parent.clone(task="a"))], [found(parent.clone())]) < 1e-4


def test_no_warm_start_unless_asked_and_a_deepcopy_has_a_memory_of_its_own() -> None:
    parent, inputs = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True), x()
    twin, cold = copy.deepcopy(parent), ImplicitCGHead(nn.Linear(4, 3), 0.1)
    for visited, asked in ((parent, twin), (cold, cold)):
        visit(visited, inputs, 5, task="a")
        assert torch.equal(asked.clone(task="a").module.weight, asked.module.weight)
