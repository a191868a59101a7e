"""What the papers' tests share."""

import pytest

from experiments.tracking.values import CheckedMetrics


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], float]:
    """What runs record, by metric and step."""
    found: dict[tuple[str, int], float] = {}
    keep = staticmethod(lambda name, value, step, now: found.update({(name, step): value}))
    monkeypatch.setattr(CheckedMetrics, "sink", keep)
    return found
