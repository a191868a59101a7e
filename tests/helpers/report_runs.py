"""Runs as Sacred records them, without running anything, and the report of them."""

import csv
import hashlib
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from gridfs import GridFS
from sacred.utils import set_by_dotted_path

from experiments.report.__main__ import main
from experiments.sweeps.definition import Cell
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.plan import Plan, make_plan
from experiments.tracking.uploader import index_metrics

pytest_plugins = ("toy_process",)
GRID = tuple({"algorithm.lr": lr} for lr in (0.03, 0.1, 0.3))
START = datetime(2026, 1, 1)
COMMIT = "a" * 40
CURVE = {100: 0.5, 200: 0.65, 300: 0.7}
"""A validation curve like any other."""

WORDS = ("accuracy", "benchmark=glyphs", "methods=ImplicitCGHead,anil")
"""The sweep that the fixture `plan` plans, as the report is asked for it."""

Report = Callable[..., Path]
"""The fixture `report`: writes the report of some words; its folder."""


class Recorder:
    """Inserts run documents and their metrics into a pymongo database."""

    def __init__(self, documents: Any) -> None:
        self.documents = documents
        index_metrics(documents)  # as every run does
        self._files: dict[tuple[str, str], Any] = {}
        self._number = 0

    def run(
        self,
        config: Mapping[str, Any],
        metrics: Mapping[str, Mapping[int, float]] | None = None,
        status: str = "COMPLETED",
        **fields: Any,
    ) -> int:
        """One run; its number. Fields: those of the document, and those of `_experiment`."""
        self._number += 1
        start = START + timedelta(minutes=self._number)
        stop = None if status == "RUNNING" else start + timedelta(seconds=300)
        listed = [{"name": name, "id": str(ObjectId())} for name in metrics or ()]
        info = {**fields.pop("info", {}), **({"metrics": listed} if listed else {})}
        self.documents["runs"].insert_one({
            "_id": self._number, "experiment": self._experiment(fields), "config": nested(config),
            "status": status, "start_time": start, "stop_time": stop, "result": None, "info": info,
            "heartbeat": start + timedelta(seconds=290), "host": {"hostname": "here"}, **fields,
        })  # fmt: skip
        for entry, points in zip(listed, (metrics or {}).values(), strict=True):
            self.documents["metrics"].insert_one({
                "_id": ObjectId(entry["id"]), "run_id": self._number, "name": entry["name"],
                "steps": list(points), "values": list(points.values()),
                "timestamps": [start] * len(points),
            })  # fmt: skip
        return self._number

    def _experiment(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Takes from the fields: experiment (name), sources (content by file), commit, dirty."""
        sources = fields.pop("sources", {"experiments/train.py": "1"})
        repository = {"commit": fields.pop("commit", COMMIT), "dirty": fields.pop("dirty", False)}
        return {
            "name": fields.pop("experiment", "train"),
            "sources": [[name, self._file(name, md5)] for name, md5 in sources.items()],
            "repositories": [{**repository, "url": "https://x"}],
            "dependencies": ["torch==2.13.0", "numpy==1.26.4"],
        }

    def training(self, cell: Cell, curve: Mapping[int, float], **options: Any) -> int:
        """A complete training of a cell, with this validation curve, 0.1 s an iteration."""
        result = {"test_accuracy": 0.6, "test_half_width": 0.01, "iterations": max(curve),
                  "step_seconds": 0.11, "step_cpu_seconds": 0.1, "step_peak_bytes": 2.0**25,
                  "process_peak_bytes": 2.0**29, "diverged": None, **options.pop("result", {})}
        metrics = {**validations(curve), **options.pop("metrics", {})}
        config = {"tasks.name": cell.configs[0], "algorithm.name": cell.configs[1],
                  **cell.settings, "cell": cell.identity}  # fmt: skip
        return self.run(config, result=result, metrics=metrics, **options)

    def _file(self, name: str, md5: str) -> Any:
        if (name, md5) not in self._files:
            content = md5.encode()
            real = hashlib.md5(content).hexdigest()
            self._files[name, md5] = GridFS(self.documents).put(content, filename=name, md5=real)
        return self._files[name, md5]


def validations(curve: Mapping[int, float]) -> dict[str, dict[int, float]]:
    return {
        "validation/accuracy": dict(curve),
        "validation/half_width": dict.fromkeys(curve, 0.02),
        "validation/training_seconds": {step: step / 10 for step in curve},
    }


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"algorithm": {"lr": 0.1}} from {"algorithm.lr": 0.1}."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        set_by_dotted_path(tree, key, value)
    return tree


def fill(recorder: Recorder, plan: Plan, generator: random.Random, share: float = 1.0) -> None:
    """A share of the cells of a plan; of each grid the second candidate is the best."""
    for group in plan.groups:
        for number, cell in enumerate([*group.grid.values(), *group.finals[1].values()]):
            if generator.random() < share:
                level = (0.5, 0.6, 0.55, 0.7)[min(number, 3)] + generator.gauss(0, 0.01)
                curve = {100: level - 0.2, 200: level - 0.1, 300: level}
                recorder.training(cell, curve, result={"test_accuracy": level - 0.03})


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines(True)))


def markdown(folder: Path, name: str) -> str:
    """A table's file, its cells without the spaces that align them."""
    return re.sub(" +", " ", (folder / f"{name}.md").read_text(encoding="utf-8"))


def row(folder: Path, name: str, method: str) -> dict[str, str]:
    (found,) = [r for r in rows(folder, name) if r["method"] == method]
    return found


def finals(plan: Plan, method: str, candidate: int = 1) -> list[Cell]:
    (group,) = [group for group in plan.groups if group.name == method]
    return list(group.finals[candidate].values())


def grid(recorder: Recorder, plan: Plan, method: str) -> None:
    """A complete grid whose second candidate is the best."""
    (group,) = [group for group in plan.groups if group.name == method]
    for cell, value in zip(group.grid.values(), (0.5, 0.6, 0.55), strict=True):
        recorder.training(cell, {100: 0.3, 200: value})


@pytest.fixture
def recorder(database: Any) -> Recorder:
    return Recorder(database)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """Of the accuracy sweep with a grid of these tests' own, whatever it has."""
    whole = SWEEPS["accuracy"]
    methods = {name: replace(m, grid=GRID) for name, m in whole.methods.items()}
    monkeypatch.setitem(SWEEPS, "accuracy", replace(whole, methods=methods))
    return make_plan(SWEEPS["accuracy"], {"benchmark": "glyphs", "methods": "ImplicitCGHead,anil"})


@pytest.fixture
def report(tmp_path: Path) -> Report:

    def write(*words: str) -> Path:
        assert main([*words, "--output", str(tmp_path / "report")]) == 0
        return tmp_path / "report"

    return write
