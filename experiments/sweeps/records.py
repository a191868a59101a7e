"""What Sacred's collections say about cells: which are complete, of which code, how accurate."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from pymongo.errors import DuplicateKeyError

from experiments.sweeps.cells import Cell, Settings
from experiments.tracking.database import Database
from experiments.tracking.ingredient import REPOSITORY

CHOICES = "sweep_choices"
FIELDS = {
    name: 1
    for name in (
        "config.cell", "start_time", "stop_time", "result",
        "experiment.sources", "experiment.repositories",
    )
}


@dataclass(frozen=True)
class CompleteRun:
    """A completed run of a cell.

    Attributes:
        run_id: its number in Sacred's ``runs``.
        seconds: from its start to its end.
        accuracy: test accuracy and half width of its interval in [0, 1], None if it has none.
        commit: of the code; empty outside a repository.
        changed: whether a source file it recorded differs from the one here.
        diverged: why it left the finite numbers, empty if it did not.
    """

    run_id: Any
    seconds: float
    accuracy: tuple[float, float] | None
    commit: str
    changed: bool
    diverged: str = ""


class Records:
    """The runs of a database, and the choices made from them.

    Args:
        database: where runs are recorded.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._md5: dict[Any, str] = {}

    def index(self) -> None:
        """Make the look-up by cell independent of the number of runs."""
        self._database.documents["runs"].create_index("config.cell")

    def complete(self, identities: Iterable[str]) -> dict[str, CompleteRun]:
        """The newest completed run of each cell that has one, by the cell's identity."""
        wanted = {"config.cell": {"$in": list(identities)}, "status": "COMPLETED"}
        found = list(self._database.documents["runs"].find(wanted, FIELDS))
        self._read_md5(found)
        here: dict[str, str] = {}
        found.sort(key=lambda run: (run["stop_time"], str(run["_id"])))
        return {run["config"]["cell"]: self._complete_run(run, here) for run in found}

    def unfinished(self, identity: str) -> list[Any]:
        """Numbers of the cell's runs that were stopped, of the code that is here, newest first."""
        stopped = {"config.cell": identity, "status": {"$in": ["INTERRUPTED", "FAILED"]}}
        found = list(self._database.documents["runs"].find(stopped, FIELDS).sort("start_time", -1))
        self._read_md5(found)
        here: dict[str, str] = {}
        return [run["_id"] for run in found if not self._is_changed(run, here)]

    def _is_changed(self, run: Mapping[str, Any], here: dict[str, str]) -> bool:
        sources = run["experiment"].get("sources", ())
        return any(self._md5.get(file) != _md5_here(name, here) for name, file in sources)

    def _complete_run(self, run: Mapping[str, Any], here: dict[str, str]) -> CompleteRun:
        repositories = run["experiment"].get("repositories") or [{}]
        return CompleteRun(
            run["_id"],
            (run["stop_time"] - run["start_time"]).total_seconds(),
            _accuracy(run.get("result")),
            repositories[0].get("commit", ""),
            self._is_changed(run, here),
            _entry(run.get("result"), "diverged") or "",
        )

    def _read_md5(self, runs: Iterable[Mapping[str, Any]]) -> None:
        files = {file for run in runs for _, file in run["experiment"].get("sources", ())}
        unknown = {"_id": {"$in": list(files - self._md5.keys())}}
        if files - self._md5.keys():
            for entry in self._database.documents["fs.files"].find(unknown, {"md5": 1}):
                self._md5[entry["_id"]] = entry.get("md5", "")

    def validation_accuracy(self, run: CompleteRun) -> float:
        """The last ``validation/accuracy``; minus infinity without one, or for a diverged run."""
        key = {"run_id": run.run_id, "name": "validation/accuracy"}
        series = self._database.documents["metrics"].find_one(key, {"values": 1})
        value = float(series["values"][-1]) if series and series["values"] else -math.inf
        return -math.inf if math.isnan(value) or run.diverged else value

    def choose(
        self, group: str, candidates: list[tuple[Settings, Cell]], runs: Mapping[str, CompleteRun]
    ) -> dict[str, Any]:
        """The best candidate of a grid, decided once for the same runs and recorded.

        Args:
            group: the method's name.
            candidates: settings and cell, in the grid's order.
            runs: complete runs of these cells; a candidate without one cannot be chosen.

        Returns:
            ``{"index", "settings", "accuracies", "runs", "time", ...}``.
        """
        complete = [runs.get(cell.identity) for _, cell in candidates]
        ids = [run.run_id if run else None for run in complete]
        key = {"_id": choice_id([cell.identity for _, cell in candidates], ids)}
        choices = self._database.documents[CHOICES]
        if (decided := choices.find_one(key)) is not None:
            return decided
        accuracies = [self.validation_accuracy(r) if r else -math.inf for r in complete]
        index = accuracies.index(max(a for a, r in zip(accuracies, complete, strict=True) if r))
        choice = {
            **key,
            "method": group,
            "index": index,
            "settings": [list(item) for item in candidates[index][0].items()],
            "cells": [cell.identity for _, cell in candidates],
            "runs": ids,
            "accuracies": accuracies,
            "time": datetime.now(timezone.utc),
        }
        try:
            choices.insert_one(choice)
        except DuplicateKeyError:  # another worker has just decided, from the same runs
            return choices.find_one(key) or choice
        return choice


def choice_id(identities: list[str], run_ids: list[Any]) -> str:
    """What a choice is found by: the grid's cells and the runs it was made from."""
    text = repr([identities, run_ids])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _accuracy(result: Any) -> tuple[float, float] | None:
    if _entry(result, "test_accuracy") is None:
        return None
    return float(result["test_accuracy"]), float(result.get("test_half_width", math.nan))


def _entry(result: Any, key: str) -> Any:
    return result.get(key) if isinstance(result, Mapping) else None


def _md5_here(name: str, known: dict[str, str]) -> str:
    """The md5 of the source file of this name in this repository, empty if there is none."""
    if name not in known:
        path = REPOSITORY / name
        content = path.read_bytes() if path.is_file() else None
        known[name] = "" if content is None else hashlib.md5(content).hexdigest()
    return known[name]
