"""The drill of the tracking: see the others in this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.drills import outage


@pytest.mark.slow
def test_the_database_is_away_for_a_minute_and_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("L2L_IMPLICIT_MONGO_URL", "")
    assert outage.drill(tmp_path, seconds=60.0)
