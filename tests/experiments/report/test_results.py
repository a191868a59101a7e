"""Runs as a DataFrame: of a database, of files, of the documented example."""

import doctest
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
import pytest
from report_runs import Recorder

import experiments.report
from experiments.report import get_results

pytest_plugins = ("report_runs",)

ROOT = Path(__file__).parents[3]
MEMORY = ROOT / "docs" / "records" / "papers_figures.jsonl.gz"


@pytest.fixture(autouse=True)
def filled(recorder: Recorder) -> None:
    for seed, lr in enumerate((0.1, 0.2, 0.1)):
        recorder.run({"algorithm.lr": lr, "seed": seed, "test_at": [1, 2]},
                     {"validation/accuracy": {1: 0.5, 2: 0.5 + seed / 10}},
                     result={"test_accuracy": 0.6, "per": {"class": seed}})  # fmt: skip
    recorder.run({"seed": 7}, status="FAILED")
    recorder.run({"hidden": 64}, experiment="memory", result=0.5)


def test_a_row_a_run() -> None:
    runs = get_results()
    assert runs["_id"].tolist() == [1, 2, 3, 5] and set(runs["status"]) == {"COMPLETED"}
    first = runs.iloc[0]
    assert (first["config.algorithm.lr"], first["config.test_at"]) == (0.1, [1, 2])
    assert (first["result.test_accuracy"], first["result.per.class"]) == (0.6, 0)
    assert runs["metrics.validation/accuracy"].tolist()[:3] == pytest.approx([0.5, 0.6, 0.7])
    assert first["seconds"] == 300 and first["host"] == "here" and first["commit"] == "a" * 40
    assert first["start_time"] == pd.Timestamp("2026-01-01 00:01", tz="UTC")
    assert pd.isna(runs.iloc[3]["config.seed"]) and runs.iloc[3]["result.returned"] == 0.5


@pytest.mark.parametrize(("asked", "numbers"), [
    ({"experiment": "train"}, [1, 2, 3]), ({"experiment": "memory"}, [5]),
    ({"filter_dict": {"config.algorithm.lr": 0.1, "config.seed": 2}}, [3]),
    ({"states": None}, [1, 2, 3, 4, 5]), ({"states": ["FAILED"]}, [4]), ({"states": []}, []),
    ({"states": "FAILED"}, [4]), ({"records": f"{MEMORY}", "experiment": "memory"}, [1]),
    ({"filter_dict": {"config.no": None}}, []), ({"records": []}, []),
    ({"experiment": "none"}, []),
])  # fmt: skip
def test_runs_are_chosen_and_nothing_chosen_is_nothing(asked: Any, numbers: list[int]) -> None:
    assert get_results(**asked)["_id"].tolist() == numbers


def test_the_documented_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The docstring's, and that of docs/report.md, whose mean is recomputed."""
    monkeypatch.chdir(ROOT)
    assert doctest.testmod(experiments.report) == (0, 2)
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(from experiments.report import get_results\n.*?)^```",
                            text, re.MULTILINE | re.DOTALL)  # fmt: skip
    names: dict[str, Any] = {}
    exec(compile(example, "docs/report.md", "exec"), names)
    runs, table = names["runs"], names["table"]
    tests = runs[runs["config.algorithm.name"] == "maml"]["result.test_accuracy"].tolist()
    assert len(tests) == 3 and table.loc["maml", "mean"] == pytest.approx(mean(tests))
