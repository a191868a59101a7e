"""Linear heads without a closed form, a regulariser or samples: right, warned of, or refused.

Hard ones with a closed form: `test_random_heads.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit_from, linear
from small_task import adapt
from solver_settings import WAYS, clustered
from torch import Tensor, nn
from verdict import Heard, judge, must_be_right

from l2l_implicit import LBFGS, GradientDescent, ImplicitCGHead, Newton

D = torch.float64
Y = torch.arange(12) % 3
WITHOUT_CLOSED_FORM: dict[str, Callable[[Tensor], Tensor]] = {
    "smoothed": lambda out: F.cross_entropy(out, Y, label_smoothing=0.1),
    "weighted": lambda out: F.cross_entropy(out, Y, weight=torch.tensor([1.0, 9.0, 0.1]).to(out)),
    "one against all": lambda out: F.binary_cross_entropy_with_logits(
        out, F.one_hot(Y, 3).to(out)),
    "focal": lambda out: ((1 - F.softmax(out, 1)[torch.arange(12), Y]).square()
                          * F.cross_entropy(out, Y, reduction="none")).mean(),
    "scaled": lambda out: F.cross_entropy(out * 1.0, Y) * 3.0,
    "squares": lambda out: (out - F.one_hot(Y, 3).to(out)).square().mean(),
}  # fmt: skip
DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "small": lambda x: 0.3 * x, "large": lambda x: 30.0 * x,
    **{f"constant {value:g}": lambda x, value=value: torch.cat([0 * x[:, :1] + value, x[:, 1:]], 1)
       for value in (1.0, 255.0, 1e5)},
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_CLOSED_FORM)
@pytest.mark.parametrize("data", DATA)
def test_without_a_closed_form(name: str, data: str) -> None:
    """Theta is one scale a feature, in support and query.

    For squares of large outputs the direct and the implicit gradient cancel to a thousandth of
    either, which no error that the learner can know of shows (docs/mathematics.md): float32 has no
    digits for it, and is asked for the implicit one alone.
    """
    loss = WITHOUT_CLOSED_FORM[name]
    support, queries = (DATA[data](part.double()) for part in clustered(3, 4, 6))

    def gradient(dtype: torch.dtype, in_query: bool, **settings: Any) -> Tensor:
        scale = torch.ones(6, dtype=dtype, requires_grad=True)
        learner = ImplicitCGHead(nn.Linear(6, 3).to(dtype), 0.1, l2=0.1, **settings).clone()
        x, query = support.to(dtype), queries.to(dtype)
        learner.adapt(lambda: loss(learner(x * scale)), steps=60)
        F.cross_entropy(learner(query * scale if in_query else query), Y).backward()
        return scale.grad

    def truth(in_query: bool) -> Tensor:
        return implicit_from(
            lambda p, s: loss(linear(p, support * s, 3)) + 0.05 * p.square().sum(),
            lambda p, s: F.cross_entropy(linear(p, queries * s if in_query else queries, 3), Y),
            torch.zeros(21, dtype=D), torch.ones(6, dtype=D),
        )  # fmt: skip

    for dtype in (torch.float32, D):
        both = (name, data, dtype) != ("squares", "large", torch.float32)
        find, right = partial(gradient, dtype, both), truth(both)
        (must_be_right if data == "constant 1" else judge)(find, right)
        for way in ("LBFGS", "Neumann", "direct"):
            judge(partial(find, **WAYS[way]), right)


# No regulariser, no samples, a start that is good already.


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_no_regulariser(way: str, size: float) -> None:
    """Least squares with more samples than features: their span's curvature stands for l2."""
    torch.manual_seed(0)
    x, query = (size * part.double() for part in clustered(3, 8, 5))
    y = F.one_hot(torch.arange(24) % 3, 3).to(D)
    ones = torch.ones(24, 1, dtype=D)
    theta = x.clone().requires_grad_()
    a = torch.cat([theta, ones], 1)
    w = torch.linalg.solve(a.t() @ a, a.t() @ y)
    F.mse_loss(torch.cat([query, ones], 1) @ w, y).backward()
    for how, dtype in (("closure", torch.float32), ("closure", D), ("loss", D), ("together", D)):

        def gradient(how: str = how, dtype: torch.dtype = dtype) -> Tensor:
            features, goal = x.clone().to(dtype).requires_grad_(), y.to(dtype)
            head = ImplicitCGHead(nn.Linear(5, 3).to(dtype), 0.1, l2=0.0, **WAYS[way])
            learner = head.clone()
            if how == "together":
                adapted = head.adapt_together(features[None], goal[None], steps=60)
                outputs = adapted(query[None].to(dtype))[0]
            else:
                steps = 60 if how == "closure" else 5
                adapt(learner, lambda: F.mse_loss(learner(features), goal), how, steps)
                outputs = learner(query.to(dtype))
            F.mse_loss(outputs, goal).backward()
            return features.grad

        judge(gradient, theta.grad)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("l2", [1e-3, 1e-4])
def test_targets_that_the_head_fits(l2: float, dtype: torch.dtype) -> None:
    """Residuals next to nothing are no reason for doubt: the squared error's S knows none."""
    torch.manual_seed(0)
    x, query, start = torch.randn(6, 5), torch.randn(8, 5), flat(nn.Linear(5, 2).parameters())
    y, asked = linear(torch.randn(12), x, 2), torch.randn(8, 2)

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        loss = F.mse_loss(linear(phi, theta.view(6, 5), 2), y.double())
        return loss + 0.5 * l2 * (phi - start).square().sum()

    truth = implicit_from(
        inner, lambda phi, _: F.mse_loss(linear(phi, query.double(), 2), asked.double()),
        start.double(), x.double().flatten(),
    )  # fmt: skip

    def gradient() -> Tensor:
        head = nn.Linear(5, 2).to(dtype)
        nn.utils.vector_to_parameters(start.to(dtype), head.parameters())
        features = x.to(dtype, copy=True).requires_grad_()
        learner = ImplicitCGHead(head, 0.1, l2=l2, anchor="init").clone()
        learner.adapt(F.mse_loss(learner(features), y.to(dtype)))
        F.mse_loss(learner(query.to(dtype)), asked.to(dtype)).backward()
        return features.grad.flatten()

    must_be_right(gradient, truth)


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("inner", [Newton(), LBFGS(), GradientDescent(tol=1e-3)], ids=repr)
@pytest.mark.parametrize("moved", [0.0, 1e-9, 1e-2])
def test_a_warm_start_is_never_dearer(closed_form: bool, inner: Any, moved: float) -> None:
    """Calls of the closure and products of the backward pass; the data as they were, or nearly."""
    torch.manual_seed(0)
    x, y = torch.randn(10, 6), torch.arange(10) % 5
    head = ImplicitCGHead(nn.Linear(6, 5), lr=0.1, warm_start=True, inner=inner)
    calls: list[int] = []
    products: list[int] = []
    for visit in range(4):
        learner, z = head.clone(task="a"), (x + visit * moved).requires_grad_()
        calls.append(0)

        def closure(learner=learner, z=z) -> Tensor:  # type: ignore[no-untyped-def]
            calls[-1] += 1
            return F.cross_entropy(learner(z) if closed_form else learner(z) * 1.0, y)

        learner.adapt(closure, steps=200)
        F.cross_entropy(learner(z), y).backward()
        products.append(learner.diagnostics.cg_steps)
    assert max(calls[1:]) <= calls[0] and max(products[1:]) <= products[0], (calls, products)


NONE = torch.zeros(0).long(), torch.zeros(0, 3)
EMPTY: dict[str, Callable[[Tensor, str], Tensor]] = {
    "cross-entropy": lambda out, reduction: F.cross_entropy(out, NONE[0], reduction=reduction),
    "squared error": lambda out, reduction: F.mse_loss(out, NONE[1], reduction=reduction),
    "no closed form": lambda out, reduction: getattr(out.square(), reduction)(),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("way", WAYS)
def test_no_support(name: str, reduction: str, anchor: str, way: str) -> None:
    """The sum is 0 and leads to the anchor; the mean of nothing is refused, or taken for 0."""
    head, none = nn.Linear(5, 3), torch.zeros(0, 5, requires_grad=True)
    goal = flat(head.parameters()) if anchor == "init" else torch.zeros(18)
    kinds = {"cross-entropy": nn.CrossEntropyLoss, "squared error": nn.MSELoss}
    runs = [(net, how) for net in (head, nn.Sequential(head, nn.Tanh(), nn.Linear(3, 3)))
            for how in ("closure", "loss")]  # fmt: skip
    runs += [(head, "together")] if name in kinds else []
    for net, how in runs:

        def adapted(net=net, how=how) -> Tensor:  # type: ignore[no-untyped-def]
            loss = kinds[name](reduction=reduction) if how == "together" else None
            parent = ImplicitCGHead(net, 0.1, l2=0.5, anchor=anchor, loss=loss, **WAYS[way])
            if how == "together":
                y = NONE[name == "squared error"]
                heads = parent.adapt_together(torch.zeros(2, 0, 5), torch.stack([y, y]), steps=60)
                heads(torch.ones(2, 2, 5)).sum().backward()
                return torch.cat([heads.weight[1].flatten(), heads.bias[1]])
            learner = parent.clone()
            adapt(learner, lambda: EMPTY[name](learner(none), reduction), how, 60)
            learner(torch.ones(2, 5)).sum().backward()
            return flat(list(learner.module.parameters())[:2])

        heard = Heard(adapted)
        assert heard.error is None or heard.refused, repr(heard.error)
        if heard.error is None:
            assert reduction == "sum" or how == "together"
            away = float((heard.value.detach() - goal).abs().max())
            assert away < 1e-3 or heard.warned, f"{away:.2g} from the anchor"


def test_gradient_descent_that_has_not_reached_the_anchor() -> None:
    """Features of zeros, no bias: the query loss still sees the weights, which are halfway."""
    query, y, found = torch.randn(6, 5, dtype=D), torch.arange(6) % 3, []
    for steps in (20, 4000):

        def gradient(steps: int = steps) -> Tensor:
            torch.manual_seed(0)
            x = torch.zeros(6, 5, dtype=D, requires_grad=True)
            head = nn.Linear(5, 3, bias=False, dtype=D)
            learner = ImplicitCGHead(head, 0.1, l2=0.2, inner=GradientDescent()).clone()
            adapt(learner, lambda: F.cross_entropy(learner(x), y), "closure", steps)
            F.cross_entropy(10 * learner(query), y).backward()
            return x.grad

        found.append(gradient)
    judge(found[0], found[1]())
