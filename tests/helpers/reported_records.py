"""A recorded file in a database of its own, and the report of it: for tests of claims."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from experiments.report.__main__ import main as report
from experiments.tracking import open_database
from experiments.tracking.import_runs import main as import_runs


@contextmanager
def reported(records: Path, words: Sequence[str], folder: Path) -> Iterator[Any]:
    """The pymongo database; the report of the sweep that `words` name is in ``folder/report``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2L_IMPLICIT_DATA", str(folder / "data"))
        patch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
        patch.setenv("L2L_IMPLICIT_MONGO_URL_FILE", "")
        patch.setenv("HOME", str(folder))
        assert import_runs([str(records)]) == 0
        assert report([*words, "--output", str(folder / "report")]) == 0
        with open_database() as documents:
            yield documents
