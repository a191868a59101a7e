"""A killed run goes on from its checkpoint and ends as if nothing had happened. Real runs."""

import errno
import fcntl
import hashlib
import io
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest import MonkeyPatch
from sacred.utils import iterate_flattened, set_by_dotted_path
from train_process import ENDLESS, LONG, Bench, assert_same, refusal

from experiments.tracking import UserError, open_database
from experiments.train import ex, main
from experiments.training import checkpoint

pytest_plugins = ("train_process",)
SETTINGS = ("with", "smoke", "anil", "iterations=24", "validate_every=5", "early_stopping=True",
            "meta_lr_schedule=cosine", "meta_weight_decay=0.01", "meta_batch=2",
            "checkpoint_seconds=1e-6")  # fmt: skip
STATE: dict[str, Any] = {"value": 1, "settings": "{}"}


def copied(folder: Path) -> str:
    """The setting that resumes a copy of a run: this process holds what it has opened."""
    copy = folder.parent / f"copy-{len(list(folder.parent.iterdir()))}"
    shutil.copytree(folder, copy)
    return f"resume={copy}"


def document(run_id: int) -> dict[str, Any]:
    with open_database() as database:
        found = database["runs"].find_one({"_id": run_id})
        assert found is not None
        return found


def test_a_killed_run_ends_as_an_undisturbed_one(bench: Bench) -> None:
    """Three iterations and a validation after the last checkpoint, all of which are done again."""
    bench.finish(*SETTINGS)
    happens = {"checkpoint": 8, "signal": (12, signal.SIGKILL)}
    assert bench.start(*SETTINGS, happens=happens).wait() == -signal.SIGKILL, bench.text()
    (left,) = bench.checkpoints()
    assert checkpoint.load(left.parent)["steps"] == 8
    left.with_suffix(".new").write_bytes(b"half")
    bench.finish("resume=latest")
    with open_database() as database:
        assert_same(bench, database, 1, 3)
    killed, resumed = document(2), document(3)
    assert killed["status"] == "INTERRUPTED" and killed["info"]["resumed_by"] == 3
    assert resumed["status"] == "COMPLETED" and resumed["info"]["resumes"] == "2"
    assert not bench.checkpoints()
    assert [path.name for path in left.parent.iterdir()] == ["config.json"]


def test_settings_are_the_run_s_own(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused by name, or done and recorded; also what a damaged config.json says is not used."""
    folder = bench.killed("-u", *LONG)
    (folder / "config.json").write_text(json.dumps({"output": {"py/object": "os.system"}}))
    assert "got model.hidden=16 " in refusal("with", copied(folder), "model.hidden=16")
    assert "expected iterations=40" in refusal(copied(folder), "iterations=1")
    tested = folder.parent / copied(folder).partition("=")[2]
    state = checkpoint.load(tested)
    state |= {"settings": json.dumps(state["settings"]), "steps": 40}
    checkpoint.save(tested, {**state, "scores": {**state["scores"], "result": (0.5, 0.1)}})
    assert "iterations=40" in refusal(f"resume={tested}", "iterations=60")
    strange = folder.parent / "a\x1b[31m"
    (folder.parent / copied(folder).partition("=")[2]).rename(strange)
    main(["train", f"resume={strange}", "-u", "iterations=43", f"output={bench.folder / 'more'}"])
    (more,) = (bench.folder / "more").iterdir()
    assert json.loads((more / "config.json").read_text())["iterations"] == 43
    said = capsys.readouterr().out
    assert "median of 43" in said and "\x1b" not in said and r"run a\x1b[31m after" in said


def test_no_other_setting_is_taken() -> None:
    """Each of the run's own and of every ingredient."""
    config = ex._create_run("print_config", {}, ["smoke"], options={}).config
    known = {key for key, _ in iterate_flattened(config)} - set(checkpoint.MAY_DIFFER)
    assert len(known) > 40
    for key in known:
        other = json.loads(json.dumps(config))
        set_by_dotted_path(other, key, "other")
        with pytest.raises(UserError, match=f"got {key}='other' "):
            checkpoint.check_settings(config, other)
    checkpoint.check_settings(config, {**config, "output": "x", "resume": "y", "iterations": 60})
    decays = {**config, "meta_lr_schedule": "cosine"}
    checkpoint.check_settings(decays, {**decays, "output": "x"})
    with pytest.raises(UserError, match="got iterations=60 "):
        checkpoint.check_settings(decays, {**decays, "iterations": 60})
    for here, there in ((config, {**config, "newer": 1}), ({**config, "older": 1}, config)):
        with pytest.raises(UserError, match="differ in (newer|older); go on with that version"):
            checkpoint.check_settings(here, there)


@pytest.mark.parametrize("which", ["latest", "8", "''"])
def test_nothing_to_resume_is_one_line(tmp_path: Path, which: str) -> None:
    if which == "8":
        (tmp_path / "7").mkdir()
        (tmp_path / "7" / checkpoint.STATE).touch()
    with pytest.raises(UserError, match="resume: expected") as refused:
        checkpoint.find(tmp_path, which)
    assert "\n" not in str(refused.value)


def assert_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="resume: expected a checkpoint") as refused:
        checkpoint.load(folder)
    assert "\n" not in str(refused.value)


def test_damage_anywhere_is_one_line(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, STATE)
    path = tmp_path / checkpoint.STATE
    whole = path.read_bytes()
    assert checkpoint.load(tmp_path)["value"] == 1
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert_refused(tmp_path)
    for size in (0, 1, 31, 32, 33, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert_refused(tmp_path)
    path.write_bytes(whole + b"\0")
    assert_refused(tmp_path)
    for make in (None, os.mkdir, os.mkfifo):  # what is no file
        path.unlink() if path.is_file() else path.rmdir() if path.is_dir() else None
        if make is not None:
            make(path)
        assert_refused(tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {"settings": "[1]"}, {"settings": "{"}, {}, None])
def test_a_whole_file_of_another_kind_is_one_line(tmp_path: Path, content: Any) -> None:
    file = io.BytesIO()
    torch.save(content, file)
    checksum = hashlib.sha256(file.getvalue()).digest()
    (tmp_path / checkpoint.STATE).write_bytes(file.getvalue() + checksum)
    assert_refused(tmp_path)


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, None])
def test_a_save_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: MonkeyPatch, reason: int | None
) -> None:
    """By an error, or by other bytes on the disk than were written."""
    checkpoint.save(tmp_path, STATE)

    def fails(descriptor: int) -> None:
        if reason is not None:
            raise OSError(reason, os.strerror(reason))
        os.truncate(tmp_path / "checkpoint.new", 100)

    monkeypatch.setattr(os, "fsync", fails)
    said = "other bytes than were written" if reason is None else os.strerror(reason)
    with pytest.raises(UserError, match=said):
        checkpoint.save(tmp_path, {**STATE, "value": 2})
    assert checkpoint.load(tmp_path)["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.STATE]


def test_global_generators_go_on_where_they_were(tmp_path: Path) -> None:
    """They are stored as plain data: a checkpoint loads with ``weights_only=True``."""

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    drawn()
    checkpoint.save(tmp_path, STATE)
    expected = drawn()
    checkpoint.restore_generators(checkpoint.load(tmp_path)["generators"])
    assert drawn() == expected


@pytest.mark.parametrize("options", [(), ("-u",)], ids=["recorded", "unobserved"])
def test_a_live_run_is_not_resumed(
    bench: Bench, monkeypatch: MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Running or stopped; killed, it is, and by one process only."""
    monkeypatch.chdir(bench.folder)
    live, folder = bench.started(*options, *ENDLESS)
    for stop in (False, True):
        if stop:
            os.kill(live.pid, signal.SIGSTOP)
        for which in ("latest", str(folder)):
            assert f"where process {live.pid} on " in refusal(f"resume={which}")
    assert live.poll() is None
    if not options:
        found = document(1)
        assert found["status"] == "RUNNING" and "resumed_by" not in found["info"]
    live.kill()
    live.wait()
    if options:
        second, new = bench.started("-u", f"resume={folder}", "output=second")
        assert f"where process {second.pid} on " in refusal(f"resume={new}")
        assert "expected a checkpoint" in refusal(f"resume={folder}")
        second.kill()
        second.wait()


def test_a_folder_without_a_checkpoint_stays_as_it_is(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Also a file that is called like the lock; a lock that leads elsewhere is not followed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / checkpoint.LOCK).write_text("mine")
    for which in ("", ".", str(tmp_path)):
        assert "expected a checkpoint" in refusal(f"resume={which}")
    assert "File name too long" in refusal(f"resume={'a' * 5000}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / checkpoint.LOCK).symlink_to(tmp_path / checkpoint.LOCK)
    checkpoint.save(tmp_path / "run", STATE)
    assert "symbolic links" in refusal("resume=run")
    assert (tmp_path / checkpoint.LOCK).read_text() == "mine"
    assert "expected no run to go on with" in refusal("evaluate", "with", "resume=run")


def test_one_that_was_just_resumed_is_not_again(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """By a file of settings: the other process ends while this one takes the lock."""
    checkpoint.save(tmp_path, STATE)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"resume": str(tmp_path), "output": str(tmp_path)}))
    monkeypatch.setattr(checkpoint, "lock", lambda folder: (folder / checkpoint.STATE).unlink())
    assert "got none; the run has ended" in refusal("with", str(file))


def test_only_what_is_ours_is_removed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("other")
    (tmp_path / "checkpoint.new").symlink_to(other)  # not written through
    checkpoint.save(tmp_path, STATE)
    (tmp_path / "notes.new").write_text("mine")
    (tmp_path / "folder.new").mkdir()
    (tmp_path / "metrics.new").write_text("half")  # what a kill has left
    checkpoint.remove(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "notes.new", "folder.new"}
    assert other.read_text() == "other"


def test_no_two_runs_share_a_folder(tmp_path: Path) -> None:
    """Another database numbers its runs from 1 too, and its checkpoint must not be lost."""
    names = [checkpoint.new_folder(tmp_path / "runs", "1").name for _ in range(3)]
    assert names == ["1", "1-2", "1-3"]


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    checkpoint.lock(tmp_path)
    assert f"warning: no lock on {tmp_path}" in capsys.readouterr().out
