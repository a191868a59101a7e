"""A file of recorded runs, and the report of it: for tests of claims."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.report.__main__ import main as report

Recorded = list[dict[str, Any]]
"""As the file's lines: {"runs": document, "metrics": {name: {"steps": ..., "values": ...}}}."""


def reported(records: Path, words: Sequence[str], folder: Path) -> Recorded:
    """The file's lines; the report of the sweep that `words` name is in ``folder/report``."""
    assert report([*words, "--records", str(records), "--output", str(folder / "report")]) == 0
    with gzip.open(records, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def points(line: dict[str, Any], name: str) -> dict[int, float]:
    """A metric of one line by step; empty if the run has none."""
    metric = line["metrics"].get(name, {"steps": [], "values": []})
    return dict(zip(metric["steps"], metric["values"], strict=True))
