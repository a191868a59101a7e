"""The main job as a user runs it: a process, the embedded database, real images."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gridfs
import pytest
import torch
from matplotlib.image import imread

from experiments.tracking import open_database

ROOT = Path(__file__).parents[3]
PER_ITERATION = (
    "train/query_loss",
    "train/query_accuracy",
    "train/hypergradient_norm",
    "train/hypergradient_error",
    "train/cg_residual",
    "train/cg_steps",
    "train/unsolved",
    "train/unsolved_inner",
    "train/unsolved_linear",
    "train/seconds",
    "train/process_peak_bytes",
)


def run(module: str, *arguments: str, cwd: Path, **environment: str) -> Any:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", f"experiments.{module}", *arguments]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder, with the database below it."""
    path = tmp_path_factory.mktemp("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2L_IMPLICIT_DATA", str(path / "data"))
        patch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
        yield path


@pytest.fixture(scope="module")
def finished(folder: Path) -> Any:
    return run("train", "with", "smoke", cwd=folder)


@pytest.fixture(scope="module")
def document(finished: Any, folder: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    with open_database() as database:
        yield database["runs"].find_one({"experiment.name": "train"}), database


def test_it_says_what_a_newcomer_wants_to_know(finished: Any, folder: Path) -> None:
    assert "over 8 new tasks (95 % interval)" in finished.stdout
    assert "with nearest centroid on the same tasks" in finished.stdout
    assert "MiB of tensors at its peak" in finished.stdout
    assert "run 1 of the embedded database" in finished.stdout
    assert "meta-training" in finished.stderr and "iteration/s" in finished.stderr
    picture = finished.stdout.split("learning curve")[1].split()[0]
    assert imread(folder / picture).shape[2] == 4


def test_the_document_has_configuration_versions_host_and_seeds(document: Any) -> None:
    entry, _ = document
    assert entry["status"] == "COMPLETED"
    assert entry["config"]["algorithm"]["l2"] == 0.1
    assert entry["config"]["tasks"]["level"] == "easy"
    assert entry["config"]["seed"] == 0
    names = " ".join(entry["experiment"]["dependencies"])
    assert all(name in names for name in ("torch", "learn2learn", "sacred", "pymongo"))
    assert entry["host"]["hostname"] and entry["host"]["python_version"]


def test_every_iteration_is_recorded(document: Any) -> None:
    _, database = document
    series = {metric["name"]: metric for metric in database["metrics"].find({"run_id": 1})}
    for name in PER_ITERATION:
        assert series[name]["steps"] == [1, 2, 3, 4], name
        assert all(isinstance(value, int | float) for value in series[name]["values"])
    assert series["validation/accuracy"]["steps"] == [2, 4]
    assert series["train/step_peak_bytes"]["values"][0] > 1e6


def test_the_result_and_the_artifacts_are_in_the_database(document: Any) -> None:
    entry, database = document
    assert entry["info"]["result"] == entry["result"]
    recorded = database["metrics"].find_one({"run_id": 1, "name": "test/accuracy"})
    assert [entry["result"]["test_accuracy"]] == recorded["values"]
    assert 0 <= entry["result"]["test_accuracy"] <= 1
    assert entry["result"]["test_half_width"] > 0
    files = {artifact["name"]: artifact["file_id"] for artifact in entry["artifacts"]}
    storage = gridfs.GridFS(database)
    state = torch.load(io.BytesIO(storage.get(files["parameters.pt"]).read()), weights_only=True)
    assert set(state["head"]) == {"weight", "bias"}
    assert imread(io.BytesIO(storage.get(files["learning_curve.png"]).read())).ndim == 3


def test_the_same_seed_gives_the_same_run(finished: Any, folder: Path) -> None:
    again = run("train", "-u", "with", "smoke", cwd=folder)
    assert again.returncode == 0
    first, second = (out.stdout.split("outer step")[0] for out in (finished, again))
    assert first == second


BAD = {
    "algorithm.steps=0": "algorithm.steps (K): expected at least 1, got 0",
    "algorithm.cg_steps=0": "algorithm.cg_steps (N): expected at least 1, got 0",
    "algorithm.lr=0.0": "algorithm.lr: expected a number above 0, got 0",
    "algorithm.l2=-1.0": "algorithm.l2: expected a number of at least 0, got -1",
    "algorithm.name=rm_metall": "did you mean 'rm_metal'?",
    "algorithm.step=newtn": "did you mean 'newton'?",
    "tasks.name=glyfs": "did you mean 'glyphs'?",
    "tasks.level=mediun": "did you mean 'medium'?",
    "tasks.split=skript": "did you mean 'script'?",
    "tasks.ways=1000": "train_ways",
    "tasks.shots=100": "train_samples",
    "tasks.queries=0": "tasks.queries: expected at least 1, got 0",
    "tasks.size=32": "size",
    "model.name=cnn5": "did you mean 'cnn4'?",
    "model.hidden=0": "model.hidden: expected at least 1",
    "iterations=0": "iterations: expected at least 1, got 0",
    "meta_lr=-0.1": "meta_lr: expected a number above 0",
    "algoritm.lr=0.1": "did you mean 'algorithm",
    "iteration=3": "did you mean 'iterations'?",
    "meta_batch=1.5": "meta_batch",
    "model.chunk_size=10": "model.chunk_size: expected at least the whole batch of 50 images",
    "algorithm.name=anil algorithm.l2=0.1": "algorithm.l2: expected no such setting for anil",
    "tasks.name=sine tasks.level=None score=accuracy": "score: expected 'mse' for sine",
    "tasks.name=sine tasks.level=None model.name=cnn4": "model.name: expected mlp for vectors",
    "device=cuda:99": "device: expected auto, cpu or a GPU that is there, got 'cuda:99'",
    "score=mse": "score: expected 'accuracy' for glyphs",
    "budget=0": "budget: expected a number above 0",
    "test_at=[0]": "test_at: expected at least 1, got 0",
    "validate_seconds=-1": "validate_seconds: expected a number above 0",
    "meta_optimizer=adamm": "did you mean 'adam'?",
}


def test_bad_settings_are_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, unobserved: twenty starts of a process would take a minute."""
    from experiments.train import ex

    for setting, expected in BAD.items():
        with pytest.raises(SystemExit) as stopped:
            ex.run_commandline(["train", "-u", "with", "smoke", *setting.split()])
        lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("error: ")]
        assert stopped.value.code == 1 and len(lines) == 1, setting
        assert expected in lines[0], (setting, lines[0])


def test_a_missing_data_set_says_what_to_fetch(folder: Path) -> None:
    answer = run("train", "-u", "with", "caltech101", f"tasks.root={folder}", cwd=folder)
    assert answer.returncode == 1
    assert "Caltech" in answer.stdout and "Traceback" not in answer.stdout + answer.stderr


def test_no_database_at_the_url_is_said_at_once(folder: Path) -> None:
    url = "mongodb://somebody:hush-hush@127.0.0.1:9/l2l"
    answer = run(
        "train",
        cwd=folder,
        L2L_IMPLICIT_MONGO_URL=url,
        L2L_IMPLICIT_MONGO_TIMEOUT="0.5",
    )
    assert answer.returncode == 1
    assert "error: no database answers" in answer.stdout
    assert "meta-training" not in answer.stderr
    assert "hush-hush" not in answer.stdout + answer.stderr
