"""What counts as theta, however it gets into the inner loss."""

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from problems import EXACT
from small_task import HOWS, fit
from small_task import SIX_LABELS as Y
from small_task import six_inputs as x
from torch import Tensor, nn

from l2l_implicit import ImplicitCGHead

pytestmark = pytest.mark.usefixtures("float64")


class Inputs(dict):
    """A dict with an attribute, as model libraries pass them about."""

    main = property(lambda self: self["main"])


class Nested(nn.Linear):
    """Features in nested arguments."""

    def forward(self, inputs: Inputs, *, scale: dict[str, Tensor]) -> Tensor:
        return super().forward(inputs.main[0] * scale["value"])


class Named(torch.autograd.Function):
    """Someone's own function, whose node has an attribute that torch's leaves have too."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.variable = torch.zeros(1)
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


CASES = {  # the head, and whether it is called by the learner's forward
    "nested inputs": (Nested, True),
    "nested inputs of the module": (Nested, False),
    "a function of one's own": (nn.Linear, False),
    "the features' gradient asked before": (nn.Linear, True),
    "a first-order learner": (nn.Linear, True),
}


@HOWS
@pytest.mark.parametrize("case", CASES)
def test_theta_in_unusual_company(case: str, how: str) -> None:
    """Features and a scale: their gradients are those of the plain call."""
    theta, scale, data = torch.randn(4, 4), torch.tensor(1.3), x()
    plain, (kind, inside), grads = nn.Linear(4, 3), CASES[case], []
    odd = kind(4, 3)
    odd.load_state_dict(plain.state_dict())
    for unusual in (False, True):
        leaves = [theta.clone().requires_grad_(), scale.clone().requires_grad_()]
        h, factor = torch.tanh(data @ leaves[0]), leaves[1] * 1.0
        first_order = unusual and case == "a first-order learner"
        learner = ImplicitCGHead(odd if unusual else plain, 0.1, first_order, **EXACT).clone()
        net = learner if inside else learner.module

        def loss(unusual=unusual, h=h, factor=factor, net=net, y=Y) -> Tensor:
            if unusual and kind is Nested:
                out = net(Inputs(main=[h]), scale={"value": factor})
            else:
                out = net((Named.apply(h) if unusual and "function" in case else h) * factor)
            value = F.cross_entropy(out, y)
            if unusual and "before" in case and value.requires_grad:
                torch.autograd.grad(value, h, retain_graph=True)
            return value

        for _ in range(8):
            given = {"loss": loss, "steps": 1} if how == "closure" else {"loss": loss()}
            learner.adapt(**given, first_order=False)
        grads.append(torch.autograd.grad(loss(y=Y.roll(1)), leaves))
    assert relative_error(*grads) < 1e-9


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
