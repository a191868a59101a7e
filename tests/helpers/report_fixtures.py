"""Fixtures of the report's tests: a database to fill, and the report of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from report_runs import Recorder

from experiments.report.__main__ import main
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.plan import Plan, make_plan

pytest_plugins = ("toy_process",)
GRID = tuple({"algorithm.lr": lr} for lr in (0.03, 0.1, 0.3))


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
def report(tmp_path: Path) -> Callable[..., Path]:
    """Writes the report of these words into a folder."""

    def write(*words: str) -> Path:
        assert main([*words, "--output", str(tmp_path / "report")]) == 0
        return tmp_path / "report"

    return write
