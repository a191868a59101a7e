"""What counts as theta, however it gets into the inner loss."""


import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from small_task import HOWS, fit
from small_task import SIX_LABELS as Y
from small_task import six_inputs as x
from torch import Tensor, nn

from l2l_implicit import CG, ImplicitCGHead, Newton

pytestmark = pytest.mark.usefixtures("float64")
EXACT = {"inner": Newton(cg_steps=200, tol=1e-13), "linear": CG(steps=200, tol=1e-13)}


@HOWS
def test_zero_anchor_gives_the_initial_value_exactly_zero(how: str) -> None:
    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1)
    learner, inputs = parent.clone(), x()
    fit(learner, inputs, how)
    F.cross_entropy(learner(inputs), Y).backward()
    for parameter in parent.module.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


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
        learner = ImplicitCGHead(module, 0.1, **EXACT).clone()
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
        learner = ImplicitCGHead(nn.Linear(4, 3), 0.1, **EXACT)
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


def test_first_order_learner_asked_for_an_implicit_step() -> None:
    """Its forward notes no features; the loss's graph still says where theta is."""
    theta, data = torch.randn(4, 4, requires_grad=True), x()
    module, grads = nn.Linear(4, 3), []
    for first_order in (False, True):
        learner = ImplicitCGHead(module, 0.1, first_order, **EXACT).clone()
        h = torch.tanh(data @ theta)
        for _ in range(8):
            learner.adapt(F.cross_entropy(learner(h), Y), first_order=False)
        grads.append(torch.autograd.grad(F.cross_entropy(learner(h), Y), theta))
    assert relative_error(*grads) < 1e-10


@pytest.mark.parametrize(("factor", "fatal"), [(None, 1), (None, 2), (1.0, 3)])
def test_an_exception_in_a_closure_leaves_the_learner_as_it_was(
    factor: float | None, fatal: int
) -> None:
    """Also its hypergradient: what it had before is what it has after. A factor hides the closed
    form, whose closure is called twice only."""
    parent, inputs = ImplicitCGHead(nn.Linear(4, 3), 0.1, anchor="init"), x()
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


class Inputs(dict):
    """A dict with an attribute, as model libraries pass them about."""

    main = property(lambda self: self["main"])


class TakesInputs(nn.Linear):
    def forward(self, inputs: Inputs) -> Tensor:
        return super().forward(inputs.main)


class Named(torch.autograd.Function):
    """Someone's own function, whose node has an attribute that torch's leaves have too."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.variable = torch.zeros(1)
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("case", ["dict of one's own", "function of one's own"])
def test_theta_in_unusual_company(case: str) -> None:
    theta, data, grads = torch.randn(4, 4, requires_grad=True), x(), []
    plain, odd = nn.Linear(4, 3), TakesInputs(4, 3)
    odd.load_state_dict(plain.state_dict())
    for unusual in (False, True):
        module = odd if unusual and case.startswith("dict") else plain
        learner, h = ImplicitCGHead(module, 0.1, **EXACT).clone(), torch.tanh(data @ theta)

        def output(learner=learner, h=h, unusual=unusual) -> Tensor:
            if not unusual:
                return learner(h)
            return learner(Inputs(main=h)) if case.startswith("dict") else learner.module(
                Named.apply(h)
            )

        learner.adapt(lambda out=output: F.cross_entropy(out(), Y), steps=15)
        grads.append(torch.autograd.grad(F.cross_entropy(output(), Y.roll(1)), theta))
    assert relative_error(grads[1], grads[0]) < 1e-9
