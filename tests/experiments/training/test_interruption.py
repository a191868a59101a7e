"""A signal: the step is finished, the state saved. Another one: the end, at once. Real signals."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import MonkeyPatch
from test_training import TEST_SIZE, Learner, Run, Tasks, falling, schedule
from train_process import ENDLESS, TIMED, Bench

from experiments.tracking import Terminated, UserError, open_database, signals
from experiments.training import checkpoint
from experiments.training.loop import Training

pytest_plugins = ("train_process",)


class Signalled(Learner):
    """Sends signals to this process in the middle of its third step, a validation, test or last
    test; so many seconds before each but the first."""

    def __init__(self, where: str, *signums: int, after: float = 0.0, **more: Any) -> None:
        super().__init__(**more)
        self._where, self._signums, self._after = where, signums or (signal.SIGINT,), after

    def step(self, batch: list[Any]) -> Any:
        if self._where == "step" and self.done == 2:
            self._meet()
        return super().step(batch)

    def evaluate(self, stream: Any, number: int, progress: Callable[[range], range]) -> Any:
        names = ("test", "test", "last test")[len(self.tested) :]
        where = names[0] if stream.sample().inputs.numel() == TEST_SIZE else "validation"
        for task in progress(range(number)):
            torch.rand(3)  # evaluation draws random numbers
            if self._where == where and task == 1:
                self._meet()
        return super().evaluate(stream, number, progress)

    def _meet(self) -> None:
        self._where = ""
        for place, signum in enumerate(self._signums):
            if place:
                time.sleep(self._after)
            os.kill(os.getpid(), signum)
            time.sleep(0.001)  # Python runs the handler


def trained(folder: Path, learner: Learner, **changes: Any) -> Training:
    return Training(Run(), learner, Tasks(), schedule(**changes), 0, folder)  # type: ignore[arg-type]


def interrupted(folder: Path, learner: Learner, kind: type[BaseException] = KeyboardInterrupt,
                **changes: Any) -> dict[str, Any]:  # fmt: skip
    """The checkpoint that a run leaves which is interrupted by this kind of error."""
    with signals.handled(), pytest.raises(kind):
        trained(folder, learner, **changes).loop()
    return checkpoint.load(folder)


def untimed(training: Training) -> dict[str, Any]:
    """What was recorded, without time and memory."""
    return {k: v for k, v in training.run.values.items() if not k.endswith(TIMED)}


@pytest.mark.usefixtures("not_by_nohup")
@pytest.mark.parametrize("signum", signals.SIGNALS, ids=lambda number: number.name)
def test_a_step_is_finished_and_saved(tmp_path: Path, signum: int) -> None:
    """Also SIGALRM, from outside like the others, and what clusters send before they kill."""
    kind = KeyboardInterrupt if signum == signal.SIGINT else Terminated
    before = signal.getsignal(signum)
    state = interrupted(tmp_path, Signalled("step", signum), kind)
    assert (state["steps"], state["learner"]["done"]) == (3, 3)
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("word", ["", "-u "])
def test_the_command_that_goes_on_is_printed(tmp_path: Path, capsys: Any, word: str) -> None:
    """An unobserved run's goes on unobserved: perhaps there is no database."""
    training = trained(tmp_path, Signalled("step"))
    training.run.unobserved = bool(word)
    with signals.handled(), pytest.raises(KeyboardInterrupt):
        training.loop()
    said = f"saved; python -m experiments.train {word}resume={tmp_path}\n"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("where", "steps"), [
    ("step", 3), ("validation", 4), ("test", 6), ("last test", 10),
])  # fmt: skip
def test_what_is_broken_off_is_done_again(tmp_path: Path, where: str, steps: int) -> None:
    """A step is finished; a validation or a test begins anew, and nothing of it is to be seen. The
    last test is that of theta of the best validation."""
    changes = {"early_stopping": True, "test_at": (6,)}
    torch.manual_seed(0)
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", Signalled("", score=falling), **changes)
    whole.loop()
    torch.manual_seed(0)
    state = interrupted(tmp_path, Signalled(where, score=falling), **changes)
    assert (state["steps"], state["_looked"]) == (steps, where == "last test")
    torch.rand(7)
    again = trained(tmp_path, Signalled("", score=falling), **changes)
    again.load_state_dict(state)
    checkpoint.restore_generators(state["generators"])
    again.loop()
    assert again.scores.state_dict() == whole.scores.state_dict()
    assert untimed(again) == untimed(whole)
    folders = tmp_path / "whole", tmp_path
    assert torch.equal(*(checkpoint.load(at)["generators"]["torch"] for at in folders))


def test_another_version_s_checkpoint_is_refused(tmp_path: Path) -> None:
    """Of which a part is missing, or is of another type, with the checksum of that."""
    training = trained(tmp_path, Learner())
    state = training.state_dict()
    without = {name: value for name, value in state.items() if name != "scores"}
    for wrong in (without, {**state, "steps": None}, {**state, "peak": "x"}):
        with pytest.raises(UserError, match="of this version, got one without"):
            training.load_state_dict(wrong)
    state["scores"]["result"] = "x", 0.1
    with pytest.raises(ValueError, match="could not convert string to float"):
        training.load_state_dict(state)  # which the caller says in one line


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_saves_nothing(tmp_path: Path, second: int) -> None:
    kind = KeyboardInterrupt if second == signal.SIGINT else Terminated
    learner = Signalled("step", signal.SIGINT, second, after=signals.SAME + 0.1)
    with signals.handled():
        with pytest.raises(kind):
            trained(tmp_path, learner).loop()
        assert signals.urgent() and learner.done == 2
    assert not (tmp_path / checkpoint.STATE).exists()


def test_the_same_ctrl_c_twice_is_one(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """A terminal sends it to all processes, and a launcher hands it on."""
    monkeypatch.setattr(signals, "SAME", 600.0)
    learner = Signalled("step", signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    assert interrupted(tmp_path, learner)["steps"] == 3


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_during_a_save(tmp_path: Path, monkeypatch: MonkeyPatch, times: int) -> None:
    """One: the save is finished. Two: it is broken off, and the older checkpoint is whole."""
    training = trained(tmp_path, Learner(), checkpoint_seconds=1e-6)
    fsync, calls = os.fsync, []

    def signalled(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:  # of the file in the third save
            for place in range(times):
                time.sleep(place * (signals.SAME + 0.1))
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.001)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", signalled)
    with signals.handled(), pytest.raises(Terminated):
        training.loop()
    assert checkpoint.load(tmp_path)["steps"] == (4 if times == 1 else 2)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.STATE]


@pytest.mark.usefixtures("not_by_nohup")
def test_a_hangup_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As ``nohup`` wants it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signals.handled():
        training = trained(tmp_path, Signalled("step", signal.SIGHUP))
        training.loop()
    assert training.steps == 10


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGALRM])
def test_a_signal_ends_a_run(bench: Bench, signum: int) -> None:
    """Of an hour, in a process group of its own."""
    process, folder = bench.started(*ENDLESS)
    os.killpg(process.pid, signum)
    assert process.wait() == 128 + signum, bench.text()
    assert "Traceback" not in bench.text()
    state = checkpoint.load(folder)
    assert state["steps"] >= 1 and not list(folder.glob("*.new"))
    assert f"resume={Path('runs') / '1'}" in bench.text()
    with open_database() as database:
        assert database["runs"].find_one({"_id": 1})["status"] == "INTERRUPTED"
        recorded = database["metrics"].find_one({"name": "train/query_loss"})
    assert recorded["steps"] == list(range(1, state["steps"] + 1))
