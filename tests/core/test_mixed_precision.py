"""Under autocast the features are in half precision; the head and both solvers are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_task import adapt
from torch import Tensor, nn

from l2l_implicit import LBFGS, GradientDescent, ImplicitCGHead, Newton
from l2l_implicit.inner_solvers.protocol import InnerSolver
from l2l_implicit.linear_solvers.solution import CONVERGED, FACTORED
from l2l_implicit.mixed_precision import overflow_skips

BY_DEVICE = hasattr(torch, "get_autocast_dtype")  # torch 2.4: autocast and GradScaler on any device
HALF = [torch.bfloat16, *([torch.float16] if BY_DEVICE else [])]  # before: bfloat16 alone on a CPU
SCALE = 2.0**16  # a GradScaler's first
LABELS = torch.arange(24) % 3
EACH = pytest.mark.parametrize("how", ["loss", "closure", "together"])
HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(16, 3),
    "two layers": lambda: nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def inputs() -> Tensor:
    """Three classes, four support and four query samples each."""
    return torch.randn(3, 10)[LABELS] + torch.randn(24, 10)


def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 16))


def query_loss(head: Any, features: Tensor, how: str = "closure") -> Tensor:
    """The query loss after at most 20 inner steps."""
    learner, support, query = head.clone(), features[:12], features[12:]
    if how == "together":
        outputs = head.adapt_together(support[None], LABELS[None, :12])(query[None])[0]
    else:
        adapt(learner, lambda: F.cross_entropy(learner(support), LABELS[:12]), how, 20)
        outputs = learner(query)
    return F.cross_entropy(outputs, LABELS[12:])


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def rounded(features: Tensor, dtype: torch.dtype) -> Tensor:
    return features.detach().to(dtype).requires_grad_()


@pytest.mark.parametrize("kind, how, inner", [
    *((kind, how, inner) for kind in HEADS for how in ("loss", "closure")
      for inner in (Newton(), GradientDescent())),
    ("linear", "closure", LBFGS()), ("linear", "together", Newton()),
    ("linear", "together", GradientDescent()),
])  # fmt: skip
@pytest.mark.parametrize("dtype", HALF)
def test_only_the_last_rounding_is_left(
    dtype: torch.dtype, kind: str, how: str, inner: InnerSolver
) -> None:
    """Of the features' gradient alone: the anchor's and l2's are in full precision."""
    l2 = nn.Parameter(torch.tensor(0.1))
    settings = {"anchor": "init", "inner": inner, "max_error": 1e9}
    head = ImplicitCGHead(HEADS[kind](), lr=0.1, l2=l2, **settings)
    low = rounded(torch.randn(3, 16)[LABELS] + torch.randn(24, 16), dtype)
    wide, found = low.detach().float().requires_grad_(), []
    for features, precision in ((low, dtype), (wide, None)):
        head.zero_grad()
        with autocast(precision):
            loss = query_loss(head, features, how)
        loss.backward()
        found.append([loss, features.grad.to(dtype), *(p.grad for p in head.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Spy(ImplicitCGHead):
    """Notes the dtype in which a matrix product is computed inside both solvers."""

    seen: list[torch.dtype] = []

    def inner_step(self, at: Any) -> Tensor:
        self.seen.append((torch.eye(2) @ torch.eye(2)).dtype)
        return super().inner_step(at)

    def linear_solve(self, hvp: Any, b: Tensor, start: Tensor | None) -> Any:
        self.seen.append((torch.eye(2) @ torch.eye(2)).dtype)
        return super().linear_solve(hvp, b, start)


@EACH
def test_both_solvers_run_outside_of_autocast(how: str) -> None:
    Spy.seen.clear()
    low = rounded(torch.randn(24, 16), torch.bfloat16)
    with autocast(torch.bfloat16):
        query_loss(Spy(nn.Linear(16, 3), lr=0.1), low, how).backward()
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16
    assert len(Spy.seen) > 2 and set(Spy.seen) == {torch.float32}


def test_a_backbone_within_the_closure_stays_in_half_precision() -> None:
    body, head, x = backbone(), ImplicitCGHead(nn.Linear(16, 3), lr=0.1), inputs()
    learner, seen = head.clone(), set()

    def loss() -> Tensor:
        features = body(x)
        outputs = learner(features)
        seen.add((features.dtype, outputs.dtype))
        return F.cross_entropy(outputs, LABELS)

    with autocast(torch.bfloat16):
        learner.adapt(loss, steps=3)
    assert seen == {(torch.bfloat16, torch.float32)}


@pytest.mark.parametrize("first_order", [False, True])
def test_evaluation_without_gradients(first_order: bool) -> None:
    head = ImplicitCGHead(nn.Linear(16, 3), lr=0.1, first_order=first_order)
    low = torch.randn(24, 16).bfloat16()
    with torch.no_grad():
        with autocast(torch.bfloat16):
            found = query_loss(head, low)
        assert torch.equal(found, query_loss(head, low.float()))


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**-20, SCALE, 2.0**60, 2.0**100])
@pytest.mark.parametrize("kind", HEADS)
def test_the_hypergradient_is_linear_in_the_scale(kind: str, scale: float) -> None:
    head = ImplicitCGHead(HEADS[kind](), lr=0.1, l2=1.0)
    features, found = torch.randn(3, 16)[LABELS] + torch.randn(24, 16), []
    for factor in (1.0, scale):
        wide = features.clone().requires_grad_()
        (factor * query_loss(head, wide)).backward()
        found.append(wide.grad / factor)
        assert head.diagnostics.cg_reason == (FACTORED if kind == "linear" else CONVERGED)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_an_overflow_without_a_scaler_is_an_error() -> None:
    head, wide = ImplicitCGHead(nn.Linear(16, 3), lr=0.1), torch.randn(24, 16).requires_grad_()
    with pytest.raises(FloatingPointError, match="hypergradient"):
        (torch.inf * query_loss(head, wide)).backward()


def outer_steps(scale: float, *poisons: str) -> tuple[nn.Module, Any, list[bool]]:
    """Outer steps under a scaler, each poisoned in a way; whether each has moved the backbone."""
    body, head, x, moved = backbone(), ImplicitCGHead(nn.Linear(16, 3), lr=0.1), inputs(), []
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for poison in poisons:
        optimizer.zero_grad()
        with overflow_skips(scaler, body.parameters()):
            with autocast(torch.float16):
                big = 1e6 if poison == "features" else 1.0
                loss = query_loss(head, body(x * big) * big)
            scaler.scale(loss * (torch.inf if poison == "loss" else 1.0)).backward()
        before = nn.utils.parameters_to_vector(body.parameters()).detach()
        scaler.step(optimizer)
        scaler.update()
        after = nn.utils.parameters_to_vector(body.parameters()).detach()
        moved.append(not torch.equal(before, after))
    return body, scaler, moved


@pytest.mark.skipif(not BY_DEVICE, reason="this torch scales on a GPU only")
@pytest.mark.parametrize("poison", ["features", "loss"])
def test_a_scaler_skips_the_step_that_overflows(poison: str) -> None:
    """And lowers a scale where half precision overflows in the backward pass, and nobody raises."""
    body, scaler, moved = outer_steps(SCALE, poison, "")
    assert scaler.get_scale() == SCALE / 2 and moved == [False, True]
    assert all(bool(p.isfinite().all()) for p in body.parameters())
    body, scaler, _ = outer_steps(2.0**30, *20 * [""])
    assert scaler.get_scale() < 2.0**24
    assert all(bool(p.grad.isfinite().all()) for p in body.parameters())


@pytest.mark.skipif(not BY_DEVICE, reason="this torch scales on a GPU only")
@pytest.mark.parametrize("settings", [None, {"enabled": False}, {"init_scale": 0.5}], ids=str)
def test_what_no_scaler_would_skip_stays_an_error(settings: dict[str, Any] | None) -> None:
    """A disabled one would step on infinite gradients; one of 0.5 has skipped for long."""
    scaler = None if settings is None else torch.amp.GradScaler("cpu", **settings)
    with pytest.raises(FloatingPointError), overflow_skips(scaler, [nn.Parameter(torch.ones(1))]):
        if scaler is not None:
            scaler.scale(torch.ones(1))
        raise FloatingPointError("nan in the data")
