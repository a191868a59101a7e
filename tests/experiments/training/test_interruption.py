"""Ctrl-C once: the step is finished and saved. Twice: at once. Real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import train_process
from test_training import Learner, Run, Tasks, falling, schedule

from experiments.drills.runs import TIMED, Bench, same_parameters, same_record
from experiments.tracking import (
    Terminated,
    UserError,
    interruption,
    last_upload,
    open_database,
)
from experiments.training import checkpoint
from experiments.training.loop import Training

ROOT = Path(__file__).parents[3]

NEVER = 600.0  # seconds: longer than a test lasts on the slowest machine


class Signalled(Learner):
    """Sends a signal to this process in the middle of its third step, or of a test.

    Args:
        where: "step", or "evaluation".
        signum: what is sent.
        lasts: seconds of the rest of it.
    """

    def __init__(self, where: str, signum: int = signal.SIGINT, lasts: float = 0.0) -> None:
        super().__init__()
        self._where, self._signum, self._lasts = where, signum, lasts

    def step(self, batch: list[Any]) -> Any:
        if self._where == "step" and self.done == 2:
            self._meet()
        return super().step(batch)

    def evaluate(self, *arguments: Any) -> Any:
        torch.rand(3)  # evaluation draws random numbers
        if self._where == "evaluation":
            self._meet()
        return super().evaluate(*arguments)

    def _meet(self) -> None:
        where, self._where = self._where, ""
        os.kill(os.getpid(), self._signum)
        deadline = time.monotonic() + self._lasts
        while time.monotonic() < deadline:
            time.sleep(0.01)
        self.finished = where


def trained(folder: Path, learner: Learner, **changes: Any) -> Training:
    return Training(Run(), learner, Tasks(), schedule(**changes), 0, folder)  # type: ignore[arg-type]


def interrupted(folder: Path, learner: Learner, kind: type[BaseException]) -> dict[str, Any]:
    """The checkpoint that a run leaves which is interrupted by this kind of error."""
    with interruption.handled(), pytest.raises(kind):
        trained(folder, learner).loop()
    return checkpoint.load(folder)


def untimed(training: Training) -> dict[str, Any]:
    """What was recorded, without time and memory."""
    return {k: v for k, v in training.run.values.items() if not k.endswith(TIMED)}


@pytest.mark.parametrize(
    ("signum", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_step_is_finished_and_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, kind: type[BaseException]
) -> None:
    monkeypatch.setattr(interruption, "GRACE", NEVER)
    state = interrupted(tmp_path, Signalled("step", signum, lasts=0.2), kind)
    assert (state["steps"], state["learner"]["done"]) == (3, 3)


def test_a_step_that_takes_too_long_is_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "GRACE", 0.1)
    learner = Signalled("step", lasts=NEVER)
    state = interrupted(tmp_path, learner, KeyboardInterrupt)
    assert not hasattr(learner, "finished")
    assert (state["steps"], state["learner"]["done"]) == (2, 2)


def test_theta_is_not_left_half_updated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "GRACE", 0.1)
    learner = Signalled("step", lasts=0.5)  # the alarm comes within, late as it may be
    learner.hypergradient = lambda batch: learner.optimizer.step()  # type: ignore[method-assign]
    training = trained(tmp_path, learner)
    whole = learner.step

    def step(batch: list[Any]) -> Any:
        learner.optimizer.step()  # from here on there is no more grace
        return whole(batch)

    learner.step = step  # type: ignore[method-assign]
    with interruption.handled(), pytest.raises(KeyboardInterrupt):
        training.loop()
    assert learner.finished == "step" and checkpoint.load(tmp_path)["steps"] == 3


def test_an_evaluation_is_broken_off_and_done_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = trained(tmp_path / "whole", Learner())
    (tmp_path / "whole").mkdir()
    whole.loop()
    torch.manual_seed(0)
    learner = Signalled("evaluation", lasts=NEVER)
    state = interrupted(tmp_path, learner, KeyboardInterrupt)
    assert (state["steps"], state["_looked"], state["scores"]["validations"]) == (4, False, [])
    torch.manual_seed(0)
    assert torch.equal(state["generators"]["torch"], torch.get_rng_state())
    resumed = trained(tmp_path, Learner())
    resumed.load_state_dict(state)
    resumed.loop()
    assert resumed.scores.state_dict() == whole.scores.state_dict()
    assert untimed(resumed) == untimed(whole)


def test_the_early_stopped_test_is_broken_off_and_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = Learner(score=falling)
    test, calls = learner.evaluate, []

    def evaluate(*arguments: Any) -> Any:
        calls.append(learner.done)
        if calls == [4, 8, 10, 10, 4]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return test(*arguments)

    learner.evaluate = evaluate  # type: ignore[method-assign]
    training = trained(tmp_path, learner, early_stopping=True)
    with interruption.handled(), pytest.raises(KeyboardInterrupt):
        training.loop()
    assert "resume=" in capsys.readouterr().out
    state = checkpoint.load(tmp_path)
    assert (state["learner"]["done"], state["scores"]["stopped"]) == (10, None)
    again = Learner(score=falling)
    resumed = trained(tmp_path, again, early_stopping=True)
    resumed.load_state_dict(state)
    resumed.loop()
    assert again.tested == [4] and resumed.scores.stopped == (0.16, 0.01)


def test_another_version_s_checkpoint_is_refused(tmp_path: Path) -> None:
    training = trained(tmp_path, Learner())
    state = training.state_dict()
    del state["scores"]
    with pytest.raises(UserError, match=r"of this version, got one without \['scores'\]"):
        training.load_state_dict(state)


def test_a_second_signal_saves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "GRACE", NEVER)

    class Twice(Signalled):
        def _meet(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(interruption.SAME + 0.1)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(NEVER)

    with interruption.handled():
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, Twice("step")).loop()
        assert interruption.urgent()
    assert not (tmp_path / checkpoint.STATE).exists()


def test_the_same_ctrl_c_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to all processes, and a launcher hands it on."""
    monkeypatch.setattr(interruption, "GRACE", NEVER)
    monkeypatch.setattr(interruption, "SAME", NEVER)

    class Echo(Signalled):
        def _meet(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            self._where = ""

    assert interrupted(tmp_path, Echo("step"), KeyboardInterrupt)["steps"] == 3


# ---- real runs ----

RUN = ("with", "smoke", "iterations=1000", "validate_every=1000", "checkpoint_seconds=1e-6")


def interrupt(
    bench: Bench, *settings: str, times: int
) -> tuple[subprocess.Popen[bytes], float]:
    """A run, in a process group of its own, that gets Ctrl-C; seconds from the last to its end."""
    process = bench.start(*settings)
    while not bench.checkpoints() and process.poll() is None:
        time.sleep(0.05)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        began = time.monotonic()
        time.sleep(interruption.SAME + 0.1 if times > 1 else 0.0)
    process.wait()
    return process, time.monotonic() - began


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_run_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
    bench = Bench(tmp_path)
    process, seconds = interrupt(bench, *RUN, "meta_batch=64", times=times)
    assert process.returncode == 130, bench.text()
    # Of the five seconds that are promised, what is waited for has its own limits; what is computed
    # takes as long as the machine's other work lets it, and not the hour that the run would have.
    assert interruption.GRACE + last_upload.INTERRUPTED < 5.0
    assert seconds < 60.0 and "Traceback" not in bench.text()
    (left,) = bench.checkpoints()
    state = checkpoint.load(left.parent)
    assert state["steps"] >= 1 and not list(left.parent.glob("*.new"))
    with open_database() as database:
        found = database["runs"].find_one({"_id": 1})
        recorded = database["metrics"].find_one({"name": "train/query_loss"})
    if times == 2:  # half a second for the database; the journal has the rest
        kept = "".join(path.read_text() for path in (tmp_path / "data/journals").iterdir())
        assert found["status"] == "INTERRUPTED" or '"status": "INTERRUPTED"' in kept
    else:
        assert found["status"] == "INTERRUPTED"
        assert f"resume={Path('runs') / '1'}" in bench.text()
        assert recorded["steps"] == list(range(1, state["steps"] + 1))


@pytest.mark.slow
@pytest.mark.parametrize("step", [9, 30, 60])
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
    bench = Bench(tmp_path)
    settings = ("with", "smoke", "iterations=60", "validate_every=7", "checkpoint_seconds=0.2")
    bench.finish(*settings)
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}"}
    variables |= train_process.environment(checkpoint=7, signal=(step, signal.SIGINT))
    process = bench.start(*settings, module="train_process", **variables)
    assert process.wait() == 130, bench.text()
    bench.finish("resume=latest")
    with open_database() as database:
        found = same_parameters(bench, 1, 3) | same_record(database, 1, 3)
    assert all(found.values()), found
