"""No regulariser, no samples, a start that is good already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, implicit_from
from small_task import adapt
from solver_settings import WAYS, clustered
from torch import Tensor, nn
from verdict import Heard, judge, must_be_right

from l2l_implicit import LBFGS, GradientDescent, ImplicitCGHead, Newton

D = torch.float64


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
    for how, dtype in (("closure", torch.float32), ("closure", D), ("losses", D), ("together", D)):

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
    x, query, weight, start = (torch.randn(*s, dtype=D) for s in ((6, 5), (8, 5), (2, 5), (2, 5)))
    y, asked = x @ weight.t(), torch.randn(8, 2, dtype=D)

    def outputs(phi: Tensor, data: Tensor) -> Tensor:
        return data @ phi.view(2, 5).t()

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        loss = F.mse_loss(outputs(phi, theta.view(6, 5)), y)
        return loss + 0.5 * l2 * (phi - start.flatten()).square().sum()

    truth = implicit_from(
        inner, lambda phi, _: F.mse_loss(outputs(phi, query), asked), start.flatten(), x.flatten()
    )

    def gradient() -> Tensor:
        head = nn.Linear(5, 2, bias=False).to(dtype)
        with torch.no_grad():
            head.weight.copy_(start)
        features = x.to(dtype, copy=True).requires_grad_()
        learner = ImplicitCGHead(head, 0.1, l2=l2, anchor="init").clone()
        learner.adapt(F.mse_loss(learner(features), y.to(dtype)))
        F.mse_loss(learner(query.to(dtype)), asked.to(dtype)).backward()
        return features.grad.flatten()

    must_be_right(gradient, truth)


# Warm starts.


@pytest.mark.parametrize("closed_form", [True, False])
@pytest.mark.parametrize("inner", [Newton(), LBFGS(), GradientDescent(tol=1e-3)], ids=repr)
@pytest.mark.parametrize("moved", [0.0, 1e-9, 1e-2])
def test_a_warm_start_is_never_dearer(closed_form: bool, inner: Any, moved: float) -> None:
    """Calls of the closure and products of the backward pass; the data as they were, or nearly."""
    torch.manual_seed(0)
    x, y = torch.randn(10, 6), torch.arange(10) % 5
    head = ImplicitCGHead(nn.Linear(6, 5), lr=0.1, warm_start=True, inner=inner)
    costs: list[tuple[int, int]] = []
    for visit in range(4):
        learner, calls = head.clone(task="a"), [0]
        z = (x + visit * moved).requires_grad_()

        def closure(learner=learner, calls=calls, z=z) -> Tensor:  # type: ignore[no-untyped-def]
            calls[0] += 1
            return F.cross_entropy(learner(z) if closed_form else learner(z) * 1.0, y)

        learner.adapt(closure, steps=200)
        F.cross_entropy(learner(z), y).backward()
        costs.append((calls[0], learner.diagnostics.cg_steps))
    assert max(calls for calls, _ in costs[1:]) <= costs[0][0], costs
    assert max(products for _, products in costs[1:]) <= costs[0][1], costs


# No samples.


EMPTY: dict[str, Callable[[Tensor, str], Tensor]] = {
    "cross-entropy": lambda out, reduction: F.cross_entropy(
        out, torch.zeros(0, dtype=torch.long), reduction=reduction),
    "squared error": lambda out, reduction: F.mse_loss(
        out, torch.zeros(0, 3), reduction=reduction),
    "no closed form": lambda out, reduction: getattr(out.square(), reduction)(),
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("anchor", ["zero", "init"])
@pytest.mark.parametrize("inner", [Newton(), LBFGS(), GradientDescent(adaptive=True)], ids=repr)
def test_no_support(name: str, reduction: str, anchor: str, inner: Any) -> None:
    """The sum is 0 and leads to the anchor; the mean of nothing is refused."""
    head, none = nn.Linear(5, 3), torch.zeros(0, 5, requires_grad=True)
    goal = flat(head.parameters()) if anchor == "init" else torch.zeros(18)
    for net in (head, nn.Sequential(head, nn.Tanh(), nn.Linear(3, 3))):
        for how in ("closure", "losses"):

            def adapted(net=net, how=how) -> Tensor:  # type: ignore[no-untyped-def]
                learner = ImplicitCGHead(net, 0.1, l2=0.5, anchor=anchor, inner=inner).clone()
                adapt(learner, lambda: EMPTY[name](learner(none), reduction), how, 60)
                learner(torch.ones(2, 5)).sum().backward()
                return flat(list(learner.module.parameters())[:2])

            heard = Heard(adapted)
            assert heard.error is None or heard.refused, repr(heard.error)
            if heard.error is None:
                assert reduction == "sum"
                away = float((heard.value - goal).abs().max())
                assert away < 1e-3 or heard.warned, f"{away:.2g} from the anchor"
