"""One clear line for each kind of bad input of tasks together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l2l_implicit import Direct, GradientDescent, ImplicitCGHead

pytestmark = pytest.mark.usefixtures("float64")

NAN = torch.full((2, 8, 7), torch.nan)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(8, 7)}, ValueError, r"features: expected shape \[T, m, 7\]"),
    ({"features": torch.zeros(2, 8, 6)}, ValueError, r"got \[2, 8, 6\]"),
    ({"features": torch.zeros(0, 8, 7)}, ValueError, r"got \[0, 8, 7\]"),
    ({"features": torch.zeros(2, 8, 7).long()}, TypeError, "expected floats"),
    ({"features": [1.0]}, TypeError, "expected tensors, got list, Tensor; stack the tasks"),
    ({"features": torch.zeros(2, 8, 7, device="meta")}, ValueError, "expected one device"),
    ({"targets": torch.zeros(2, 7).long()}, ValueError, r"targets: .* of shape \[2, 8\]"),
    ({"targets": torch.zeros(2, 8)}, ValueError, r"expected floats of shape \[2, 8, 3\]"),
    ({"targets": torch.zeros(2, 8).bool()}, ValueError, "expected classes .* got torch.bool"),
    ({"targets": torch.full((2, 8), 3)}, ValueError, "expected classes 0 to 2, got 3 to 3"),
    ({"targets": torch.full((2, 8), -1)}, ValueError, "expected classes 0 to 2, got -1 to -1"),
    ({"features": NAN}, FloatingPointError, r"in tasks \[0, 1\]"),
    ({"steps": 0}, ValueError, r"steps \(K\): expected at least 1"),
    ({"steps": 2.0}, TypeError, r"steps \(K\): expected a whole number"),
    ({"query": torch.zeros(3, 5, 7)}, ValueError, r"query: expected shape \[2, q, 7\]"),
    ({"query": torch.zeros(2, 7)}, ValueError, r"query: expected shape \[2, q, 7\]"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "features": torch.zeros(2, 8, 7),
        "targets": torch.zeros(2, 8).long(),
        "query": torch.zeros(2, 5, 7),
        "steps": 5,
    }
    given = {**good, **wrong}
    head = ImplicitCGHead(nn.Linear(7, 3), 0.1)
    with pytest.raises(error, match=message) as caught:
        adapted = head.adapt_together(given["features"], given["targets"], given["steps"])
        adapted(given["query"])
    assert "\n" not in str(caught.value)


LOSSES: list[nn.Module] = [
    *(nn.CrossEntropyLoss(**settings) for settings in (
        {"label_smoothing": 0.1}, {"weight": torch.ones(3)}, {"ignore_index": 1},
        {"reduction": "none"})),
    nn.MSELoss(reduction="none"), nn.L1Loss(), nn.NLLLoss(), nn.MultiMarginLoss(),
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_another_loss_is_refused(loss: nn.Module) -> None:
    with pytest.raises(ValueError, match="loss: expected nn.CrossEntropyLoss"):
        ImplicitCGHead(nn.Linear(7, 3), 0.1, loss=loss)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_is_refused(frozen: str) -> None:
    head = nn.Linear(7, 3)
    getattr(head, frozen).requires_grad_(False)
    learner = ImplicitCGHead(head, 0.1, allow_nograd=True)
    with pytest.raises(ValueError, match=f"got {frozen} without"):
        learner.adapt_together(torch.zeros(2, 8, 7), torch.zeros(2, 8).long())


SOLVERS: list[dict[str, Any]] = [
    {}, {"linear": Direct()}, {"inner": GradientDescent()},
    {"inner": GradientDescent(), "linear": Direct()},
]  # fmt: skip


@pytest.mark.parametrize("solvers", SOLVERS, ids=str)
def test_one_bad_task_is_named(solvers: dict[str, Any]) -> None:
    """In what is given, and in what the query loss makes of it."""
    head, y = ImplicitCGHead(nn.Linear(7, 3), 0.1, **solvers), torch.arange(16).view(2, 8) % 3
    features = torch.randn(2, 8, 7).requires_grad_()
    adapted = head.adapt_together(features, y)
    scale = torch.tensor([1.0, torch.inf]).view(2, 1, 1)
    with pytest.raises(FloatingPointError, match=r"linear system of tasks \[1\]"):
        (adapted(features) * scale).sum().backward()
    features.data[1, 0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match=r"in tasks \[1\]"):
        head.adapt_together(features, y)


def test_empty_support_sets_end_at_the_anchor() -> None:
    """No samples: the regulariser alone, and no gradient to the features."""
    head = ImplicitCGHead(nn.Linear(7, 3), 0.1, anchor="init")
    x = torch.zeros(2, 0, 7, requires_grad=True)
    adapted = head.adapt_together(x, torch.zeros(2, 0).long())
    expected: Tensor = head.module.weight
    assert torch.equal(adapted.weight, expected.expand(2, -1, -1))
    adapted(torch.ones(2, 1, 7)).sum().backward()
    assert torch.allclose(head.module.weight.grad, torch.full((3, 7), 2.0))
