"""A killed run goes on from its checkpoint and ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_process

from experiments.tracking import UserError, open_database
from experiments.training import checkpoint

ROOT = Path(__file__).parents[3]
TIMED = ("seconds", "bytes")  # what no two runs have in common
SETTINGS = ("with", "smoke", "anil", "iterations=24", "validate_every=5", "checkpoint_seconds=0.2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
    yield tmp_path


def start(folder: Path, *arguments: str, **happens: Any) -> subprocess.Popen[str]:
    """A run, in which something may happen: see `train_process`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [train_process.SCRIPT] if happens else ["-m", "experiments.train"]
    variables |= train_process.environment(**happens)
    command = [sys.executable, *program, *arguments]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)


def finish(folder: Path, *arguments: str) -> None:
    assert start(folder, *arguments).wait() == 0, (folder / "log").read_text()


def metrics(run_id: int) -> dict[str, Any]:
    with open_database() as database:
        found = database["metrics"].find({"run_id": run_id})
        return {m["name"]: (m["steps"], m["values"]) for m in found
                if not m["name"].endswith(TIMED)}


def document(run_id: int) -> dict[str, Any]:
    with open_database() as database:
        found = database["runs"].find_one({"_id": run_id})
        assert found is not None
        return found


def parameters(folder: Path) -> list[torch.Tensor]:
    state = torch.load(folder / "parameters.pt")
    return [*state["theta"], *state["backbone"].values(), *state["head"].values()]


def assert_same_end(folder: Path, reference: int, resumed: int) -> None:
    one, two = (parameters(folder / "runs" / str(run)) for run in (reference, resumed))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert metrics(reference) == metrics(resumed)
    same = ("test_accuracy", "test_half_width", "iterations")
    results = [document(run)["result"] for run in (reference, resumed)]
    assert {k: results[0][k] for k in same} == {k: results[1][k] for k in same}


def test_a_killed_run_ends_as_an_undisturbed_one(folder: Path) -> None:
    """Three iterations and a validation after the last checkpoint, all of which are done again."""
    finish(folder, *SETTINGS)
    (folder / "runs" / "1").rename(folder / "kept")
    killed_run = start(folder, *SETTINGS, checkpoint=8, signal=(12, signal.SIGKILL))
    assert killed_run.wait() == -signal.SIGKILL, (folder / "log").read_text()
    (left,) = (folder / "runs").glob("*/checkpoint.pt")
    assert checkpoint.load(left.parent)["steps"] == 8
    finish(folder, "resume=latest")
    (folder / "kept").rename(folder / "runs" / "1")
    assert_same_end(folder, 1, 3)
    killed, resumed = document(2), document(3)
    assert killed["status"] == "INTERRUPTED" and killed["info"]["resumed_by"] == 3
    assert resumed["status"] == "COMPLETED" and resumed["info"]["resumes"] == "2"
    assert not list((folder / "runs").glob("*/checkpoint.pt"))


def test_settings_go_through_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "7"
    checkpoint.write_config(run, {"seed": 3})
    (run / checkpoint.STATE).touch()
    given = ["train", f"output={tmp_path}", "resume=7", "-m", "host:1:db", "test_tasks=9"]
    assert checkpoint.arguments(given) == [
        "train", "-m", "host:1:db", "with", str(run / "config.json"), f"resume={run}",
        f"output={tmp_path}", "test_tasks=9",
    ]  # fmt: skip
    assert checkpoint.arguments(["train", "with", "smoke"]) == ["train", "with", "smoke"]


@pytest.mark.parametrize("which", ["latest", "8"])
def test_nothing_to_resume_is_one_line(tmp_path: Path, which: str) -> None:
    if which == "8":
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / checkpoint.STATE).touch()
    with pytest.raises(UserError, match="resume: expected") as refused:
        checkpoint.arguments(["train", f"resume={which}", f"output={tmp_path}"])
    assert "\n" not in str(refused.value)


def test_a_broken_checkpoint_is_one_line(tmp_path: Path) -> None:
    (tmp_path / checkpoint.STATE).write_bytes(b"torn")
    with pytest.raises(UserError, match="resume: expected a checkpoint"):
        checkpoint.load(tmp_path)


def test_a_save_that_is_cut_short_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, {"value": 1})

    def torn(state: Any, file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, {"value": 2})
    assert checkpoint.load(tmp_path)["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.STATE]


def test_global_generators_go_on_where_they_were(tmp_path: Path) -> None:
    """They are stored as plain data: a checkpoint loads with ``weights_only=True``."""

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    drawn()
    checkpoint.save(tmp_path, {})
    expected = drawn()
    checkpoint.load(tmp_path)
    assert drawn() == expected


def test_no_two_runs_share_a_folder(tmp_path: Path) -> None:
    """Another database numbers its runs from 1 too, and its checkpoint must not be lost."""
    names = [checkpoint.new_folder(tmp_path / "runs", "1").name for _ in range(3)]
    assert names == ["1", "1-2", "1-3"]
