"""One clear line for each kind of bad input of the batched head."""

from typing import Any

import pytest
import torch
from torch import nn

from l2l_implicit.batched import BatchedImplicitHead

pytestmark = pytest.mark.usefixtures("float64")

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(8, 7)}, ValueError, r"features: expected shape \[T, m, 7\]"),
    ({"features": torch.zeros(2, 8, 6)}, ValueError, r"got \[2, 8, 6\]"),
    ({"features": torch.zeros(2, 8, 7).long()}, TypeError, "expected floats"),
    ({"targets": torch.zeros(2, 7).long()}, ValueError, r"targets: expected shape \[2, 8\]"),
    ({"targets": torch.zeros(2, 8)}, TypeError, "expected torch.long"),
    ({"targets": torch.full((2, 8), 3)}, ValueError, "expected classes 0 to 2, got 3 to 3"),
    ({"features": torch.full((2, 8, 7), torch.nan)}, FloatingPointError, r"tasks \[0, 1\]"),
    ({"query": torch.zeros(3, 5, 7)}, ValueError, r"query: expected shape \[2, q, 7\]"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "features": torch.zeros(2, 8, 7),
        "targets": torch.zeros(2, 8).long(),
        "query": torch.zeros(2, 5, 7),
    }
    given = {**good, **wrong}
    with pytest.raises(error, match=message):
        head = BatchedImplicitHead(nn.Linear(7, 3), 0.1)
        head(given["features"], given["targets"])(given["query"])


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"loss": "cross_entropi"}, "did you mean 'cross_entropy'"),
    ({"linear_solver": "cgg"}, "did you mean 'cg'"),
    ({"steps": 0}, r"steps \(K\): expected at least 1"),
    ({"l2": 0, "linear_solver": "direct"}, "expected above 0 for a direct solve"),
    ({"reduction": "none"}, "reduction: expected one of 'mean', 'sum'"),
]


@pytest.mark.parametrize(("wrong", "message"), SETTINGS)
def test_bad_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchedImplicitHead(nn.Linear(7, 3), 0.1, **wrong)


def test_a_head_that_is_not_linear_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch.nn.Linear, got Sequential"):
        BatchedImplicitHead(nn.Sequential(nn.Linear(7, 3)), 0.1)


def test_a_query_loss_that_is_not_finite_is_an_error() -> None:
    for solver in ("cg", "direct"):
        head = BatchedImplicitHead(nn.Linear(7, 3), 0.1, linear_solver=solver)
        features = torch.randn(2, 8, 7).requires_grad_()
        adapted = head(features, torch.arange(16).view(2, 8) % 3)
        scale = torch.tensor([1.0, torch.inf]).view(2, 1, 1)
        with pytest.raises(FloatingPointError, match=r"linear system: .* in tasks \[1\]"):
            (adapted(features) * scale).sum().backward()
