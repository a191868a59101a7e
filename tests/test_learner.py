"""learn2learn's contract, and what the learner leaves behind: nothing."""

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from torch import Tensor, nn

from l2l_implicit import ImplicitCGHead, ImplicitMAML
from l2l_implicit.linearization import Linearization

from learn2learn.algorithms import MAML  # isort: skip  (after l2l_implicit, which repairs it)

pytestmark = pytest.mark.usefixtures("float64")

Y = torch.arange(6) % 3


def x() -> Tensor:
    return torch.randn(6, 4)


def fit(learner: ImplicitCGHead, inputs: Tensor, how: str = "loss", steps: int = 8) -> None:
    def loss() -> Tensor:
        return F.cross_entropy(learner(inputs), Y)

    if how == "closure":
        learner.adapt(loss, steps=steps)
    else:
        for _ in range(steps):
            learner.adapt(loss())


class MyHead(ImplicitCGHead):
    """A subclass with a constructor of its own, an attribute, and a parameter."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 3), lr=0.1)
        self.note, self.gain = ["kept"], nn.Parameter(torch.ones(()))


# The contract


@pytest.mark.parametrize("method", ["__init__", "clone", "adapt", "forward"])
def test_signature_begins_as_learn2learns(method: str) -> None:
    ours = list(inspect.signature(getattr(ImplicitCGHead, method)).parameters.values())
    theirs = list(inspect.signature(getattr(MAML, method)).parameters.values())
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    assert all(p.kind == p.KEYWORD_ONLY for p in ours[len(theirs) :])
    assert isinstance(ImplicitCGHead(nn.Linear(2, 2), 0.1), MAML)


def test_clone_keeps_class_and_attributes() -> None:
    parent = MyHead(4)
    clone = parent.clone().clone()
    assert type(clone) is MyHead and clone.note is parent.note and clone.gain is parent.gain
    assert clone.module.weight is not parent.module.weight
    inputs = x()
    assert torch.equal(clone(inputs), parent(inputs))
    clone.extra, clone.note = 1, []
    assert not hasattr(parent, "extra") and parent.note == ["kept"]


def test_missing_attributes_come_from_the_module() -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1)
    assert parent.out_features == parent.clone().out_features == 3
    with pytest.raises(AttributeError):
        _ = parent.clone().no_such_thing


def test_clone_overrides_flags() -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1)
    flags = {"first_order": True, "allow_unused": True, "allow_nograd": True}
    clone = parent.clone(**flags)
    assert all(getattr(clone, name) is True for name in flags)
    assert not any(getattr(parent.clone(), name) for name in flags)
    assert ImplicitCGHead(nn.Linear(4, 3), 0.1, allow_nograd=True).allow_unused is True


def test_state_dict_has_learn2learns_keys() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    ours, theirs = ImplicitCGHead(copy.deepcopy(module), 0.1), MAML(module, 0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.clone().state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("used", [False, True])
def test_copies_of_a_parent(way: str, used: bool, tmp_path) -> None:
    parent = MyHead(4) if way == "deepcopy" else ImplicitCGHead(nn.Linear(4, 3), 0.1, l2=0.7)
    if used:
        learner = parent.clone()
        fit(learner, x())
        learner(x()).sum().backward()
    if way == "deepcopy":
        twin = copy.deepcopy(parent)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(parent))
    else:
        torch.save(parent, tmp_path / "head.pt")
        twin = torch.load(tmp_path / "head.pt", weights_only=False)
    assert type(twin) is type(parent) and twin.l2 == parent.l2
    assert twin.module.weight is not parent.module.weight
    inputs, pair = x(), (parent.clone(), twin.clone())
    for learner in pair:
        learner.zero_grad()
        fit(learner, inputs, "closure")
    assert torch.equal(pair[0](inputs), pair[1](inputs))
    parent.zero_grad(), twin.zero_grad()
    pair[1](inputs).square().sum().backward()
    assert twin.module.weight.grad is not None and parent.module.weight.grad is None


def test_state_dict_through_a_file(tmp_path) -> None:
    parent, other = (ImplicitCGHead(nn.Linear(4, 3), 0.1) for _ in range(2))
    torch.save(parent.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other.module.weight, parent.module.weight)


@pytest.mark.parametrize("how", ["loss", "closure"])
@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_without_a_clone(how: str, anchor: str) -> None:
    """The parent itself adapts: its first parameters are still the initial value."""
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, anchor=anchor, cg_tol=1e-12)
    control = ImplicitCGHead(copy.deepcopy(parent.module), 0.1, anchor=anchor, cg_tol=1e-12)
    initial, inputs = list(parent.module.parameters()), x()
    clone = control.clone()
    for learner in (parent, clone):
        fit(learner, inputs, how)
        learner(inputs).square().sum().backward()
    grads = [p.grad for p in control.module.parameters()]
    assert all(p.grad is not None for p in initial)
    assert relative_error([p.grad for p in initial], grads) < 1e-9 or not any(
        g.any() for g in grads
    )


# Theta


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_zero_anchor_gives_the_initial_value_exactly_zero(how: str) -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1)
    learner, inputs = parent.clone(), x()
    fit(learner, inputs, how)
    F.cross_entropy(learner(inputs), Y).backward()
    for parameter in parent.module.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_gradient_before_any_step_is_plain() -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1)
    inputs = x()
    F.cross_entropy(parent.clone()(inputs), Y).backward()
    got = [p.grad.clone() for p in parent.parameters()]
    parent.zero_grad()
    F.cross_entropy(parent.module(inputs), Y).backward()
    assert relative_error(got, [p.grad for p in parent.parameters()]) == 0.0


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_clone_made_without_grad(how: str) -> None:
    parent, inputs = ImplicitCGHead(nn.Linear(4, 3), 0.1, anchor="init"), x()
    with torch.no_grad():
        quiet = parent.clone()
    for learner in (quiet, parent.clone()):
        fit(learner, inputs, how)
        F.cross_entropy(learner(inputs), Y).backward()
        grads = [p.grad.clone() for p in parent.parameters()]
        parent.zero_grad()
    fit(quiet, inputs, how, 1)
    assert all(g.any() for g in grads)


def test_nested_inputs_are_part_of_theta() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, inputs, *, scale):
            return self.linear(inputs["left"][0] + inputs["right"]) * scale["value"]

    grads = []
    for inside in (True, False):
        torch.manual_seed(0)
        module, left, right = Pair(), x().requires_grad_(), x().requires_grad_()
        scale = torch.tensor(1.3, requires_grad=True)
        learner = ImplicitCGHead(module, 0.1, cg_tol=1e-12).clone()
        arguments = {"left": [left.tanh()], "right": right.tanh()}
        net = learner if inside else learner.module

        def loss(net=net, arguments=arguments, scale=scale) -> Tensor:
            return F.cross_entropy(net(arguments, scale={"value": scale * 1.0}), Y)

        learner.adapt(loss, steps=20)
        loss().backward()
        grads.append([left.grad, right.grad, scale.grad])
    assert relative_error(*grads) < 1e-10


def test_user_looked_at_the_features_gradient_before() -> None:
    """A gradient that has passed the features must not turn them into part of phi."""
    theta, data = torch.randn(4, 4, requires_grad=True), x()
    grads = []
    for look in (True, False):
        learner = ImplicitCGHead(nn.Linear(4, 3), 0.1, cg_tol=1e-12)
        with torch.no_grad():
            learner.module.weight.fill_(0.1)
            learner.module.bias.fill_(0.0)
        learner = learner.clone()
        h = torch.tanh(data @ theta)
        for _ in range(8):
            loss = F.cross_entropy(learner(h), Y)
            if look:
                torch.autograd.grad(loss, h, retain_graph=True)
            learner.adapt(loss)
        grads.append(torch.autograd.grad(F.cross_entropy(learner(h), Y), theta))
    assert relative_error(*grads) < 1e-10


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_features_changed_in_place_are_noticed(how: str) -> None:
    """Torch raises when a saved tensor was overwritten; a silent wrong number is not an option."""
    theta = torch.randn(4, 4, requires_grad=True)
    learner = ImplicitCGHead(nn.Linear(4, 3), 0.1).clone()
    h = x() @ theta
    if how == "loss":
        loss = F.cross_entropy(learner(h), Y)
        h.mul_(3.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            learner.adapt(loss)
            F.cross_entropy(learner(x()), Y).backward()
    else:
        learner.adapt(lambda: F.cross_entropy(learner(h), Y), steps=3)
        h.mul_(3.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            F.cross_entropy(learner(x()), Y).backward()


def test_first_order_learner_asked_for_an_implicit_step() -> None:
    """Its forward notes no features; the loss's graph still says where theta is."""
    theta, data = torch.randn(4, 4, requires_grad=True), x()
    module, grads = nn.Linear(4, 3), []
    for first_order in (False, True):
        learner = ImplicitCGHead(module, 0.1, first_order, cg_tol=1e-12).clone()
        h = torch.tanh(data @ theta)
        for _ in range(8):
            learner.adapt(F.cross_entropy(learner(h), Y), first_order=False)
        grads.append(torch.autograd.grad(F.cross_entropy(learner(h), Y), theta))
    assert relative_error(*grads) < 1e-10


# First order is learn2learn's


def nets() -> dict[str, nn.Module]:
    return {
        "linear": nn.Linear(4, 3),
        "deep": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
        "batch norm": nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    }


@pytest.mark.parametrize("name", list(nets()))
@pytest.mark.parametrize("where", ["constructor", "clone", "adapt"])
def test_first_order_is_exactly_learn2learns(name: str, where: str) -> None:
    torch.manual_seed(1)
    module, theta, data = nets()[name], torch.randn(4, 4, requires_grad=True), x()
    parents = MAML(module, 0.3, first_order=True), ImplicitCGHead(
        copy.deepcopy(module), 0.3, first_order=where == "constructor"
    )
    found = []
    for parent in parents:
        ours = type(parent) is not MAML
        learner = parent.clone(**({"first_order": True} if ours and where == "clone" else {}))
        h = torch.tanh(data @ theta)
        for _ in range(4):
            flag = {"first_order": True} if ours and where == "adapt" else {}
            learner.adapt(F.cross_entropy(learner(h), Y), **flag)
        theta.grad = None
        F.cross_entropy(learner(h), Y.roll(1)).backward()
        grads = [p.grad for p in parent.parameters()]
        found.append([*learner.module.parameters(), *grads, theta.grad, *learner.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_first_order_with_a_closure() -> None:
    module, inputs = nn.Linear(4, 3), x()
    one, other = ImplicitCGHead(module, 0.3, True).clone(), MAML(module, 0.3, True).clone()
    one.adapt(lambda: F.cross_entropy(one(inputs), Y), steps=5)
    for _ in range(5):
        other.adapt(F.cross_entropy(other(inputs), Y))
    assert torch.equal(one(inputs), other(inputs))


# Modules of many kinds


def test_batch_norm_buffers_are_shared_with_the_parent() -> None:
    for cls in (MAML, ImplicitCGHead):
        parent = cls(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), 0.1)
        learner = parent.clone()
        learner.adapt(F.cross_entropy(learner(x()), Y))
        assert learner.module[1].running_mean is parent.module[1].running_mean
        assert int(parent.module[1].num_batches_tracked) == 1


class Shared(nn.Module):
    """One weight by two names and two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight, self.alias = self.first.weight, self.first

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.alias(inputs)))))


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell = getattr(nn, kind)(4, 5, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.cell(inputs.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


MODULES: dict[str, Callable[[], nn.Module]] = {
    "shared": Shared,
    "LSTM": lambda: Recurrent("LSTM"),
    "GRU": lambda: Recurrent("GRU"),
    "RNN": lambda: Recurrent("RNN"),
}


@pytest.mark.parametrize("how", ["loss", "closure"])
@pytest.mark.parametrize("kind", list(MODULES))
def test_other_modules(kind: str, how: str) -> None:
    """The inner minimum is one (its gradient is zero), and the parent gets a gradient."""
    parent = ImplicitCGHead(MODULES[kind](), 0.1, anchor="init", l2=1.0, cg_tol=1e-10)
    learner, inputs = parent.clone(), x()
    count = len(list(parent.module.parameters()))
    fit(learner, inputs, how, 15)
    new = list(learner.module.parameters())
    assert len(new) == count and not any(
        a is b for a, b in zip(new, parent.module.parameters(), strict=True)
    )
    objective = F.cross_entropy(learner(inputs), Y) + 0.5 * sum(
        (p - a.detach()).square().sum() for p, a in zip(new, parent.parameters(), strict=True)
    )
    slopes = torch.autograd.grad(objective, new)
    assert max(float(g.abs().max()) for g in slopes) < 1e-8
    F.cross_entropy(learner(inputs), Y.roll(1)).backward()
    assert all(p.grad is not None and p.grad.any() for p in parent.parameters())


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_unused_parameters_go_to_their_anchor(how: str) -> None:
    module = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)})
    parent = ImplicitCGHead(module, 0.1, allow_unused=True, anchor="init")
    learner, inputs = parent.clone(), x()

    def loss() -> Tensor:
        return F.cross_entropy(learner.module["used"](inputs), Y)

    for _ in range(5):
        learner.adapt(loss() if how == "loss" else loss)
    idle, before = learner.module["idle"], parent.module["idle"]
    assert torch.equal(idle.weight, before.weight)
    (loss() + idle.weight.sum()).backward()
    assert torch.allclose(before.weight.grad, torch.ones(2, 2), rtol=1e-3)


@pytest.mark.parametrize("how", ["loss", "closure"])
def test_frozen_parameters_stay(how: str) -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, allow_nograd=True, anchor="init")
    parent.module.bias.requires_grad_(False)
    learner, inputs = parent.clone(), x()
    fit(learner, inputs, how)
    F.cross_entropy(learner(inputs), Y).backward()
    assert torch.equal(learner.module.bias, parent.module.bias)
    assert parent.module.bias.grad is None and parent.module.weight.grad.any()


# Warm starts


def visit(parent: ImplicitCGHead, inputs: Tensor, steps: int, **key: str) -> ImplicitCGHead:
    learner = parent.clone(**key)
    learner.adapt(lambda: F.cross_entropy(learner(inputs), Y), steps=steps)
    F.cross_entropy(learner(inputs), Y.roll(1)).backward()
    return learner


@pytest.mark.parametrize("anchor", ["zero", "init"])
def test_warm_start_continues_where_the_task_ended(anchor: str) -> None:
    parent, inputs = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True, anchor=anchor), x()
    first = visit(parent, inputs, 20, task="a")
    second = parent.clone(task="a")
    assert torch.equal(second.module.weight, first.module.weight)
    second = visit(parent, inputs, 1, task="a")
    assert second.diagnostics.cg_steps < first.diagnostics.cg_steps
    assert second.diagnostics.unsolved_inner == second.diagnostics.unsolved_linear == 0
    for other in (parent.clone(), parent.clone(task="b"), parent.clone(task=None)):
        assert torch.equal(other.module.weight, parent.module.weight)


def test_warm_start_does_not_move_the_hypergradient() -> None:
    theta, data, grads = torch.randn(4, 4, requires_grad=True), x(), []
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True, anchor="init", cg_tol=1e-12)
    for _ in range(2):
        learner = parent.clone(task=7)
        h = torch.tanh(data @ theta)
        fit(learner, h, "closure", 20)
        leaves = [theta, *parent.module.parameters()]
        grads.append(torch.autograd.grad(F.cross_entropy(learner(h), Y.roll(1)), leaves))
    assert relative_error(*grads) < 1e-9


def test_no_warm_start_unless_asked() -> None:
    parent, inputs = ImplicitCGHead(nn.Linear(4, 3), 0.1), x()
    visit(parent, inputs, 5, task="a")
    assert torch.equal(parent.clone(task="a").module.weight, parent.module.weight)


def test_deepcopied_warm_parent_has_a_memory_of_its_own() -> None:
    parent, inputs = ImplicitCGHead(nn.Linear(4, 3), 0.1, warm_start=True), x()
    twin = copy.deepcopy(parent)
    visit(parent, inputs, 5, task="a")
    assert torch.equal(twin.clone(task="a").module.weight, twin.module.weight)


# Nothing is left behind


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference cycles stay visible."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def linearizations(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet:
    """Every linearization that is alive."""
    alive: weakref.WeakSet = weakref.WeakSet()
    initialize = Linearization.__init__

    def spy(self, *args, **kwargs):
        initialize(self, *args, **kwargs)
        alive.add(self)

    monkeypatch.setattr(Linearization, "__init__", spy)
    return alive


HEADS = {"linear": lambda: nn.Linear(4, 3), "deep": lambda: nets()["deep"]}
CASES = [(head, how, step) for head in HEADS for how in ("loss", "closure")
         for step in ("newton", "gradient")]  # fmt: skip


@pytest.mark.parametrize("head, how, step", CASES)
def test_one_linearization_lives_and_dies_with_backward(
    head: str, how: str, step: str, no_collector: None, linearizations: weakref.WeakSet
) -> None:
    parent = ImplicitCGHead(HEADS[head](), 0.1, step=step, l2=0.5)
    learner, inputs = parent.clone(), x()
    fit(learner, inputs, how)
    assert len(linearizations) == 1
    loss = F.cross_entropy(learner(inputs), Y)
    loss.backward(retain_graph=True)
    assert len(linearizations) == 1
    loss.backward()
    assert len(linearizations) == 0 and loss is not None and learner is not None


@pytest.mark.parametrize("head, how, step", CASES)
def test_dropped_without_backward(
    head: str, how: str, step: str, no_collector: None, linearizations: weakref.WeakSet
) -> None:
    parent = ImplicitCGHead(HEADS[head](), 0.1, step=step)
    learner, inputs = parent.clone(), x()
    fit(learner, inputs, how)
    loss, gone = F.cross_entropy(learner(inputs), Y), weakref.ref(learner)
    del learner
    assert gone() is None, "the graph holds its learner"
    assert len(linearizations) == 1, "the loss does not hold its linearization"
    del loss
    assert len(linearizations) == 0


@pytest.mark.parametrize("head, how, step", CASES)
def test_features_die_with_their_owner(head: str, how: str, step: str, no_collector: None) -> None:
    parent = ImplicitCGHead(HEADS[head](), 0.1, step=step)
    theta, learner = torch.randn(4, 4, requires_grad=True), parent.clone()
    h = torch.tanh(x() @ theta)
    gone = weakref.ref(h)
    fit(learner, h, how)
    loss = F.cross_entropy(learner(h), Y)
    del h
    assert gone() is not None
    loss.backward()
    assert gone() is None, "features live on after backward, though only the loss's value is kept"
    assert theta.grad is not None and learner is not None


@pytest.mark.parametrize("head, how, step", CASES)
def test_evaluation_without_grad_keeps_nothing(
    head: str, how: str, step: str, no_collector: None, linearizations: weakref.WeakSet
) -> None:
    parent = ImplicitCGHead(HEADS[head](), 0.1, step=step).eval()
    inputs = x()
    with torch.no_grad():
        learner = parent.clone()
        learner.adapt(lambda: F.cross_entropy(learner(inputs), Y), steps=5)
        out = learner(inputs)
    assert not out.requires_grad and len(linearizations) == 0
    assert all(p.is_leaf for p in learner.module.parameters())
    assert all(p.grad is None for p in parent.parameters())
    reference = parent.clone()
    reference.adapt(lambda: F.cross_entropy(reference(inputs), Y), steps=5)
    assert torch.equal(reference(inputs), out)


def test_an_exception_in_a_closure_leaves_the_learner_as_it_was() -> None:
    """Also its hypergradient: what it had before is what it has after."""
    parent, inputs = ImplicitCGHead(nn.Linear(4, 3), 0.1, anchor="init"), x()
    grads = []
    for fails in (False, True):
        learner, calls = parent.clone(), []
        fit(learner, inputs, "closure")
        before = list(learner.module.parameters())

        def broken(learner=learner, calls=calls) -> Tensor:
            calls.append(1)
            if len(calls) == 3:
                raise KeyError("data")
            return F.cross_entropy(learner(inputs), Y.roll(1))

        if fails:
            with pytest.raises(KeyError):
                learner.adapt(broken, steps=5)
        assert all(a is b for a, b in zip(before, learner.module.parameters(), strict=True))
        loss = F.cross_entropy(learner(inputs), Y)
        grads.append(torch.autograd.grad(loss, list(parent.module.parameters())))
    assert relative_error(*grads) < 1e-9


def test_imaml_is_the_same_class_with_other_defaults() -> None:
    maml = ImplicitMAML(nn.Linear(4, 3), 0.1)
    assert isinstance(maml, ImplicitCGHead)
    assert (maml.anchor, maml.step, maml.l2) == ("init", "gradient", 2.0)
    assert type(maml.clone()) is ImplicitMAML
