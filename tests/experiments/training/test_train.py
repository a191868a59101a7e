"""The main job as a user runs it: a process, the embedded database, real images."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gridfs
import pandas as pd
import pytest
import torch
from matplotlib.image import imread
from pytest import MonkeyPatch
from train_process import refusal
from warm_process import run

from experiments.ingredients import model
from experiments.ingredients.algorithm_table import OF_CLASSES
from experiments.train import _first, ex
from experiments.training.meta_learner import MetaLearner

pytest_plugins = ("toy_process",)

ROOT = Path(__file__).parents[3]
PER_ITERATION = (
    "query_loss", "query_accuracy", "hypergradient_norm", "hypergradient_error", "cg_residual",
    "cg_steps", "unsolved", "unsolved_inner", "unsolved_linear", "seconds", "process_peak_bytes",
)  # fmt: skip
TRAIN = ("-m", "experiments.train")


@pytest.fixture(scope="module")
def finished(home: Path) -> Any:
    """Started as a user does it."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *TRAIN, "with", "smoke", "metrics_csv=True"]
    return subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True)


@pytest.fixture(scope="module")
def document(finished: Any, documents: Any) -> tuple[dict[str, Any], Any]:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return documents["runs"].find_one({"experiment.name": "train"}), documents


def test_it_says_what_a_newcomer_wants_to_know(finished: Any, home: Path) -> None:
    assert "over 8 new tasks (95 % interval)" in finished.stdout
    assert "with nearest centroid on the same tasks" in finished.stdout
    assert "MiB of tensors at its peak" in finished.stdout
    assert "run 1 of the embedded database" in finished.stdout
    assert "Result: " not in finished.stdout + finished.stderr
    assert "meta-training" in finished.stderr and "iteration/s" in finished.stderr
    picture = finished.stdout.split("learning curve")[1].split()[0]
    assert imread(home / picture).shape[2] == 4


def test_the_document_has_configuration_versions_host_and_seeds(document: Any) -> None:
    entry, _ = document
    assert entry["status"] == "COMPLETED"
    assert entry["config"]["algorithm"]["l2"] == 0.1
    assert entry["config"]["tasks"]["level"] == "easy"
    assert entry["config"]["seed"] == 0
    assert entry["meta"]["comment"] == "glyphs ImplicitCGHead, seed 0"
    names = " ".join(entry["experiment"]["dependencies"])
    assert all(name in names for name in ("torch", "learn2learn", "sacred", "pymongo"))
    assert entry["host"]["hostname"] and entry["host"]["python_version"]


def test_every_iteration_is_recorded(document: Any) -> None:
    _, database = document
    series = {metric["name"]: metric for metric in database["metrics"].find({"run_id": 1})}
    for name in PER_ITERATION:
        assert series[f"train/{name}"]["steps"] == [1, 2, 3, 4], name
        assert all(isinstance(value, int | float) for value in series[f"train/{name}"]["values"])
    assert series["validation/accuracy"]["steps"] == [2, 4]
    assert series["train/step_peak_bytes"]["values"][0] > 1e6


def test_every_metric_is_in_the_csv_file(document: Any, home: Path) -> None:
    (run, database), table = document, pd.read_csv(
        home / "runs/1/metrics.csv", index_col=0, float_precision="round_trip"
    )
    names = {metric["name"] for metric in run["info"]["metrics"]}
    assert names and names == set(table) and table.index.tolist() == [1, 2, 3, 4]
    for name in names:
        recorded = database["metrics"].find_one({"run_id": 1, "name": name})
        column = table[name].dropna()
        assert (column.index.tolist(), column.tolist()) == (recorded["steps"], recorded["values"])


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


def test_trained_parameters_are_evaluated_to_the_same_score(
    document: Any, home: Path, tmp_path: Path
) -> None:
    file = home / "runs" / "1" / "parameters.pt"
    said = run([*TRAIN, "evaluate", "with", "smoke", f"parameters={file}"], tmp_path)
    assert said.returncode == 0, said.stdout + said.stderr
    found = document[0]["result"]
    shown = f"{100 * found['test_accuracy']:.1f} ± {100 * found['test_half_width']:.1f} % over 8"
    assert shown in said.stdout, said.stdout
    assert not list(tmp_path.iterdir())
    words = "-u", "with", "smoke", f"parameters={file}", "iterations=0"
    alone = run([*TRAIN, *words], tmp_path)
    assert shown in alone.stdout and "outer step" not in alone.stdout, alone.stdout + alone.stderr
    assert "learning curve" not in alone.stdout and "Warning" not in alone.stderr
    untrained = run([*TRAIN, "evaluate", "with", "smoke"], tmp_path)
    assert untrained.returncode == 0 and shown not in untrained.stdout


@pytest.mark.parametrize("name", ["r2d2", "logistic", "protonet", "meta_sgd", "maml_msl"])
def test_it_learns_glyphs(name: str, tmp_path: Path) -> None:
    """Accuracy on 60 new tasks after 60 outer iterations, and after one: a gap of 0.1 or more."""
    config = {"meta_batch": 2, "test_tasks": 60, "validate_every": 1000, "meta_lr": 0.003,
              "model.hidden": 16, "tasks.ways": 3, "tasks.level": "clean", "output": str(tmp_path)}
    if name == "maml_msl":
        config |= {"algorithm.steps": 2, "algorithm.anneal": 30}
    options = {"--unobserved": True, "--loglevel": "ERROR"}
    before, after = (
        ex.run(None, {**config, "iterations": number}, ["smoke", name], options=options).result
        for number in (1, 60)
    )
    assert after["test_accuracy"] > before["test_accuracy"] + 0.05


BAD = {
    "algorithm.steps=0": "algorithm.steps: expected a whole number from 1 to 1000000000, got 0",
    "algorithm.lr=0.0": "algorithm.lr: expected a finite number above 0 or 'auto', got 0.0",
    "algorithm.l2=-1.0": "algorithm.l2: expected a finite number of at least 0, got -1.0; try 0.1",
    "algorithm.solver=direct algorithm.truncated=True": "solver: expected cg with a preconditioner",
    "algorithm.solver=neumann algorithm.preconditioner=jacobi": "truncated=True, got 'neumann'",
    "algorithm.name=ImplicitMAML algorithm.preconditioner=kronecker": "expected jacobi or nystrom",
    "algorithm.step=newtn": "did you mean 'newton'?",
    "tasks.name=glyfs": "did you mean 'glyphs'?",
    "tasks.level=mediun": "did you mean 'medium'?",
    "tasks.ways=1": "tasks.ways: expected a whole number from 2 to 1000000, got 1",
    "tasks.shots=0": "tasks.shots: expected a whole number from 1 ",
    "tasks.ways=1000": "(train_ways: tasks.ways)",
    "tasks.shots=100": "(train_samples: tasks.shots + tasks.queries)",
    "tasks.size=32": "tasks.name=glyphs: expected no setting tasks.size, got size=32; leave it out",
    "tasks.split_seed=0": "expected no setting tasks.split_seed, got split_seed=0; leave it out",
    "algoritm.lr=0.1": "did you mean 'algorithm",
    "algorithm.name=anil algorithm.l2=0.1": "algorithm.l2: expected no such setting for anil",
    "tasks.name=sine tasks.level=None model.name=cnn4": "model.name: expected mlp for vectors",
    "device=cuda:99": "device: expected auto, cpu or a GPU that is there, got 'cuda:99'",
    "model.name=resnet12 model.hidden=None model.last_pool=False": "last_pool: expected True for",
    "algorithm.name=ImplicitMAML model.precision=bfloat16": "expected float32 for ImplicitMAML",
    "parameters=nowhere.pt": "parameters: expected those of a run with this model and algorithm",
    # that do not fit each other, the data or the machine
    "lr=0.5": "no configuration entry 'lr'; did you mean 'algorithm.lr'?",
    "_own.lr=0.5": "no configuration entry '_own.lr'; did you mean 'algorithm.lr'?",
    "algorithm.name=anil l2=0.5": "no configuration entry 'l2'; `print_config` lists them",
    "size=5": "no configuration entry 'size'; `print_config` lists them",
    "tasks.seed=5": "no configuration entry 'tasks.seed'; did you mean 'seed'?",
    "algorithm.lr=auto": "algorithm.lr: expected a number without step=gradient, got 'auto'",
    "algorithm.lr=None": "algorithm.lr: expected a value for ImplicitCGHead, got None; try 0.1",
    "algorithm=anil": "algorithm: expected a group of settings, got 'anil'",
    "algorithm.name=[]": "algorithm.name: expected one of 'ImplicitCGHead', ",
    "algorithm.name=maml algorithm.batch_norm=together": "batch_norm: expected separately or eval",
    "algorithm.name=maml algorithm.scope=head": "scope: expected 'network' for maml, got 'head'",
    "algorithm.name=anil algorithm.variant=paper": "algorithm.variant: expected none for anil",
    "algorithm.name=itd_bio algorithm.engine=learn2learn": "engine: expected higher for itd_bio",
    "algorithm.features=as_published algorithm.together=True": "together: expected False with",
    "algorithm.name=unrolled algorithm.scope=network algorithm.batch_norm=eval "
    "algorithm.features=as_published": "features: expected 'cached' with scope='network'",
    "algorithm.name=protonet algorithm.test_steps=5": "test_steps: expected none for protonet, got",
    "algorithm.name=logistic algorithm.test_l2=1.0": "test_l2: expected none for logistic, or",
    "algorithm.name=ImplicitMAML algorithm.test_l2=1.0": "test_l2: expected none for ImplicitMAML",
    "algorithm.name=ImplicitMAML algorithm.test_crops=10": "test_crops: expected none for Implicit",
    "tasks.name=sine tasks.level=None algorithm.test_crops=10": "test_crops: expected none for",
    "algorithm.name=meta_sgd algorithm.test_scope=head": "test_scope: expected none for meta_sgd",
    **{f"algorithm.name={name} tasks.name=sine tasks.level=None":
       f"name={name}: expected tasks of classes, got a regression" for name in OF_CLASSES},
    "algorithm.test_scope=head": "algorithm.test_scope: expected none for ImplicitCGHead",
    "test_at=[5]": "test_at: expected outer iterations up to iterations=4, got 5",
    "model.name=resnet12 model.hidden=None": "for inputs of shape (1, 28, 28) that fits",
    "output=/dev/null/runs": "output: expected a folder to write to, got '/dev/null/runs' (Not a",
    "output=/proc/runs": "output: expected a folder to write to, got '/proc/runs' (No such",
    "output=a\0b": "output: expected text, got 'a\\x00b'; try 'runs'",
    "output=a\udcff": "output: expected text, got 'a\\udcff'; try 'runs'",
    f"output={'a' * 300}": "' (File name too long); try runs",
    "device=meta": "device: expected auto, cpu or a GPU that is there, got 'meta'",
    "parameters=FIFO": "FIFO: no regular file, which may be waited for; give its settings",
    "tasks.name=folder tasks.level=None tasks.root=~nobody-of-this-name/x": "tasks.name=folder: ",
    "tasks.name=caltech101 tasks.level=None tasks.root=.": "Caltech",
}


def test_bad_settings_are_one_line_each(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("FIFO")
    for setting, expected in BAD.items():
        assert expected in refusal("with", "smoke", *setting.split()), setting


@pytest.mark.parametrize(("rank", "size", "reason"), [
    ("5", "2", "rank: expected 0 to 1, got 5"), ("0", "x", "invalid literal"),
    ("0", "2", "MASTER_ADDR expected, but not set"),
])  # fmt: skip
def test_an_environment_that_is_not_torchruns_is_one_line(
    rank: str, size: str, reason: str, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """And a RANK alone makes no run an unrecorded one."""
    monkeypatch.setenv("RANK", "1")
    assert _first()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert _first() == (rank == "0")
    line = refusal("with", "smoke", f"output={tmp_path}")
    assert "RANK, WORLD_SIZE: expected torchrun's, got" in line and reason in line
    assert line.endswith("; unset them")


@pytest.mark.parametrize("error", [
    MemoryError(), RuntimeError("can't allocate memory: 9 bytes"),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes"),
])  # fmt: skip
def test_what_does_not_fit_into_memory_is_one_line(
    monkeypatch: MonkeyPatch, error: Exception, tmp_path: Path
) -> None:
    """While the network is made, and while it trains; another error stays what it is."""

    def fails(*arguments: Any) -> Any:
        raise error

    for where, name in ((model, "_build"), (MetaLearner, "step")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fails)
            assert "memory" in refusal("with", "smoke", f"output={tmp_path}")
    error = RuntimeError("a bug")
    monkeypatch.setattr(MetaLearner, "step", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        ex.run(None, {"output": str(tmp_path)}, ["smoke"], options={"--unobserved": True})
