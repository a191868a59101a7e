"""Runs of `experiments.train` as processes of their own, and what they leave, compared.

This file is also such a process, in which something happens at a given outer iteration; `HAPPENS`
in its environment says what, as JSON, so that a test need not guess how long an iteration takes:

    {"signal": [12, 9]}             the process gets signal 9 as the 12th step begins
    {"checkpoint": 8}               nothing is saved before the end but after the 8th, or a signal
    {"validations": [0.2, 0.5]}     scores by which early stopping chooses, an iteration each
"""

import io
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_process import own_data
from warm_process import Warm

ROOT = Path(__file__).parents[2]
SCRIPT = str(Path(__file__))
TIMED = ("seconds", "bytes")
"""Ends of names of metrics that no two runs have in common."""

RESULT = ("test_accuracy", "test_half_width", "iterations")
SMALL = ("with", "glyphs", "tasks.level=easy", "model.hidden=8", "meta_batch=2",
         "validation_tasks=4", "test_tasks=8")  # fmt: skip
LONG = (*SMALL, "iterations=40", "validate_every=20", "checkpoint_seconds=1e-6")
ENDLESS = (*SMALL, "iterations=1000000", "validate_every=1000000", "checkpoint_seconds=1e-6")


class Bench:
    """A folder in which runs are started, for their output and the embedded database."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.processes = folder, folder / "log", list[Warm]()

    def start(self, *arguments: str, happens: dict[str, Any] | None = None) -> Warm:
        """A process whose output goes to the log; a process group of its own, as in a shell."""
        program = ["-m", "experiments.train"] if happens is None else [SCRIPT]
        env = {**os.environ, **environment(**happens or {})}
        self.processes.append(Warm([*program, *arguments], self.folder, env, self.log))
        return self.processes[-1]

    def finish(self, *arguments: str) -> None:
        assert self.start(*arguments).wait() == 0, self.text()[-2000:]

    def started(self, *arguments: str, **options: Any) -> tuple[Warm, Path]:
        """A run that has left its first checkpoint, and its folder."""
        known, process = set(self.checkpoints()), self.start(*arguments, **options)
        while not (new := set(self.checkpoints()) - known):
            assert process.poll() is None, self.text()
            time.sleep(0.02)
        return process, new.pop().parent

    def killed(self, *arguments: str) -> Path:
        """The folder of a run killed by SIGKILL after its first checkpoint."""
        process, folder = self.started(*arguments)
        process.kill()
        process.wait()
        return folder

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def checkpoints(self) -> list[Path]:
        """Those that there are, the newest last."""
        found = []
        for path in self.folder.glob("*/*/checkpoint.pt"):
            with suppress(FileNotFoundError):  # removed meanwhile
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found)]

    def parameters(self, run: int) -> list[torch.Tensor]:
        """What a finished run has learnt."""
        path = self.folder / "runs" / str(run) / "parameters.pt"
        state = torch.load(path, weights_only=True)
        return [*state["theta"], *state["backbone"].values(), *state["head"].values()]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A folder for runs, which end with the test, and its embedded database for this process."""
    own_data(monkeypatch, tmp_path / "data")
    made = Bench(tmp_path)
    yield made
    for process in made.processes:
        process.kill()


def refusal(*words: str) -> str:
    """The one line with which an unrecorded run ends in this process."""
    from experiments.train import main

    with redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stopped:
        main(["train", "-u", *words])
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 1 and len(lines) == 1, said.getvalue()
    return lines[0]


def metrics(database: Any, run: int) -> dict[str, Any]:
    """Steps and values by name, without those of time and memory."""
    found = database["metrics"].find({"run_id": run})
    return {m["name"]: (m["steps"], m["values"]) for m in found if not m["name"].endswith(TIMED)}


def assert_same(bench: Bench, database: Any, one: int, other: int) -> None:
    """Two runs have completed, learnt and recorded the same, to the last bit."""
    learnt = zip(*map(bench.parameters, (one, other)), strict=True)
    assert all(torch.equal(*pair) for pair in learnt)
    first, second = (database["runs"].find_one({"_id": run}) for run in (one, other))
    assert first["status"] == second["status"] == "COMPLETED"
    assert [first["result"][key] for key in RESULT] == [second["result"][key] for key in RESULT]
    assert metrics(database, one) == metrics(database, other) != {}


def environment(**happens: Any) -> dict[str, str]:
    """The variables that make it happen."""
    return {"HAPPENS": json.dumps(happens)}


def let_it_happen(happens: dict[str, Any]) -> None:
    from experiments.tracking import signals
    from experiments.training.loop import Training
    from experiments.training.meta_learner import MetaLearner
    from experiments.training.scores import BestTheta

    begun = []

    def step(whole: Any, self: MetaLearner, *arguments: Any) -> Any:
        begun.append(None)
        if len(begun) == happens["signal"][0]:
            os.kill(os.getpid(), happens["signal"][1])
        return whole(self, *arguments)

    def save(whole: Any, self: Training) -> None:
        if self.steps == happens["checkpoint"] or signals.asked():
            whole(self)

    def offer(whole: Any, self: BestTheta, iteration: int, seconds: float, score: float) -> None:
        whole(self, iteration, seconds, happens["validations"][iteration - 1])

    for key, owner, name, function in (
        ("signal", MetaLearner, "step", step), ("checkpoint", Training, "_save", save),
        ("validations", BestTheta, "offer", offer),
    ):  # fmt: skip
        if key in happens:
            setattr(owner, name, partialmethod(partial(function, getattr(owner, name))))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path[0] = str(ROOT)
    let_it_happen(json.loads(os.environ["HAPPENS"]))
    runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
