"""Fixtures of the sweeps' tests and drills: a place to run in, and its database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweep_process import Place

from experiments.tracking import open_database


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place whose processes end with the test."""
    made = Place(tmp_path)
    yield made
    made.clear()


@pytest.fixture
def database(place: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The runs' database of the place."""
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(place.folder / "data"))
    monkeypatch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
    with open_database() as documents:
        yield documents
