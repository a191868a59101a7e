"""Runs exported to a file: what is in it, who reads it, and which files are refused."""

import errno
import gzip
import hashlib
import io
import json
import os
import random
import secrets
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bson import ObjectId
from pytest import CaptureFixture, MonkeyPatch
from report_runs import WORDS, Recorder, fill

from experiments.report import get_results
from experiments.report.__main__ import main as report_main
from experiments.sweeps.plan import Plan
from experiments.tracking.export import main as export
from experiments.tracking.records import FileRecords
from experiments.tracking.whole_file import write_whole

pytest_plugins = ("report_runs",)

ROOT = Path(__file__).parents[3]
DAMAGED = "got a damaged file"
ANOTHER = "line 1: expected a run as experiments.tracking.export writes it, got something else"
RUN = {"_id": 1, "status": "COMPLETED", "start_time": "2026-01-01T00:00:00+00:00", "config": {},
       "experiment": {"name": "train", "sources": [["a.py", "0cc1"]]}}  # fmt: skip
LINE = {"runs": RUN, "metrics": {"m": {"steps": [1], "values": [0.5]}}}


def exported(folder: Path, *words: str) -> Path:
    """The file that an export with these words writes."""
    assert export([str(folder / "records.jsonl.gz"), *words]) == 0
    return folder / "records.jsonl.gz"


def lines_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def zipped(*lines: Any) -> bytes:
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


def test_a_file_has_its_databases_report(recorder: Recorder, plan: Plan, tmp_path: Path) -> None:
    """File by file; only the page has the time of day, and says where its runs come from."""
    fill(recorder, plan, random.Random(0), share=0.8)
    recorder.run({"tasks.name": "glyphs", "seed": 0}, status="FAILED", fail_trace=["x", "E: no"])
    curves = {"hypergradient/logistic/itd_bio": {1: 1.0, 5: 0.5},
              "hypergradient/logistic/rm_metal_cg2": {1: 2.0, 5: 0.1}}  # fmt: skip
    recorder.run({"problems": 3}, curves, experiment="hypergradient")
    assert report_main([*WORDS, "--output", str(tmp_path / "here")]) == 0
    words = [*WORDS, "--records", str(exported(tmp_path)), "--output", str(tmp_path / "there")]
    assert report_main(words) == 0
    here, there = ({p.name: p.read_bytes() for p in (tmp_path / name).glob("*[!l]")}  # not .html
                   for name in ("here", "there"))  # fmt: skip
    assert "summary_accuracy_glyphs.csv" in here and "hypergradient.png" in here
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == []


def test_pandas_reads_it(recorder: Recorder, tmp_path: Path) -> None:
    recorder.run({"algorithm.lr": 0.1, "seed": 3}, {"m": {1: 0.5, 4: float("nan")}})
    frame = pd.read_json(exported(tmp_path), lines=True)
    assert pd.json_normalize(frame["runs"])["config.algorithm.lr"].tolist() == [0.1]
    assert frame["metrics"][0]["m"]["steps"] == [1, 4]


def test_what_is_left_out_and_which_places_are_hidden(recorder: Recorder, tmp_path: Path) -> None:
    recorder.run(
        {"tasks.root": "/data/me/images", "output": "/data/me/runs", "seed": 0},
        {"train/seconds": {1: 1.0}, "validation/accuracy": {1: 0.5}},
        captured_out="read /data/me/images/a.png", omniboard={"notes": "mine"},
        artifacts=[{"name": "parameters.pt", "file_id": ObjectId()}], experiment="train",
        fail_trace=["in /data/me/images/a.png"], meta={"options": {"--mongo_db": "me"}},
    )  # fmt: skip
    recorder.run({"seed": 1}, status="RUNNING")
    url = {"$set": {"experiment.repositories": [{"url": "/data/me/x"}]}}
    recorder.documents["runs"].update_one({"_id": 1}, url)
    path = exported(tmp_path)
    ((run, metrics),) = (line.values() for line in lines_of(path))
    assert run["config"] == {"tasks": {"root": "DATA"}, "output": "runs", "seed": 0}
    assert run["fail_trace"] == ["in DATA/a.png"]
    assert run["experiment"]["repositories"] == [{"url": ""}]
    md5 = hashlib.md5(b"1").hexdigest()  # not the file's number in this database
    assert run["experiment"]["sources"] == [["experiments/train.py", md5]]
    assert list(metrics) == ["validation/accuracy"]
    text = gzip.decompress(path.read_bytes())
    assert b"/me" not in text and b"omniboard" not in text and b"captured_out" not in text
    (whole,) = lines_of(exported(tmp_path, "--without", ""))
    assert list(whole["metrics"]) == ["train/seconds", "validation/accuracy"]


CHOSEN = {
    "2-3 5": [2, 3, 5],
    "experiment.name=memory": [5],
    "1-4 config.seed=0": [1, 4],
    "mine": ["mine"],
    "1 result.test_accuracy={[]:1}": None,
    "2-1": "write 1-2",
    "70-80": None,
    "1-99999999999": [1, 2, 3, 4, 5],
    "99999999999999999999": "8-byte", "9" * 5000: "4300 digits",
    "a=\udcff": "surrogates not allowed",
    "$where=1": "expected KEY=VALUE",
    "config.seed=": None,
    "--without (": "missing ), unterminated",
}
"""Words, and the runs that they choose: none is an error that says so, and never all of them."""


@pytest.mark.parametrize("words", list(CHOSEN))
def test_runs_are_chosen(
    words: str, recorder: Recorder, tmp_path: Path, capsys: CaptureFixture[str]
) -> None:
    for number in range(4):
        recorder.run({"seed": number % 3})
    recorder.run({"seed": 7}, experiment="memory")
    recorder.documents["runs"].insert_one({"_id": "mine", "status": "FAILED"})
    path, wanted = tmp_path / "f", CHOSEN[words]
    status = export([str(path), *words.split()])
    if isinstance(wanted, list):
        assert status == 0 and [line["runs"]["_id"] for line in lines_of(path)] == wanted
        return
    error = capsys.readouterr().err
    assert status == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert (wanted or "no run that has ended fits; nothing is written") in error
    assert not path.exists()


def test_a_metric_that_cannot_be_read_is_told(
    recorder: Recorder, tmp_path: Path, capsys: CaptureFixture[str]
) -> None:
    recorder.run({}, {"m": {1: 0.5}})
    recorder.documents["metrics"].update_one({}, {"$set": {"values": "x"}})
    assert export([str(tmp_path / "f")]) == 1
    assert "run 1: m: steps or values are no list" in capsys.readouterr().err


def test_a_run_in_two_files_counts_once_and_one_number_may_stand_for_two(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(zipped(LINE))
    b.write_bytes(zipped(LINE, {**LINE, "runs": {**RUN, "config": {"seed": 5}}}))
    found = FileRecords([a, a, b])
    assert [run["_id"] for run in found.runs] == [1, "1 (2)"]
    assert [m.series.values for m in found.metrics([1, "1 (2)"])] == [[0.5], [0.5]]


DEEP: Any = 1
for _ in range(90):
    DEEP = [DEEP]


@pytest.mark.parametrize("line", [
    {"runs": {}}, {"runs": {"_id": {"a": 1}}}, {"runs": {"_id": "/absolute/x"}}, {"runs": RUN},
    {"runs": {**RUN, "config": DEEP}}, {"runs": {**RUN, "config": {"\x1b": "\ud800"}}},
    {"runs": RUN, "metrics": [1]}, {"runs": RUN, "metrics": {"m": 1}},
    {"runs": RUN, "metrics": {"m": {"steps": [10**400], "values": [10**400]}}},
    {"runs": {**RUN, "result": {"test_accuracy": 10**400}}},
])  # fmt: skip
def test_a_line_of_any_shape_costs_itself(line: Any, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(zipped(line, {**LINE, "runs": {**RUN, "_id": 7}}))
    assert report_main(["--records", str(path), "--output", str(tmp_path / "report")]) == 0
    runs = get_results(states=None, records=[path])
    assert len(runs) == 2 and 7 in set(runs["_id"])


WHOLE = zipped(*[LINE] * 50)
HALF = len(WHOLE) // 2
FILES: dict[str, tuple[bytes | None, str]] = {
    "empty": (b"", DAMAGED), "plain text": (b"runs", DAMAGED), "cut off": (WHOLE[:-20], DAMAGED),
    "a flipped byte": (WHOLE[:HALF] + bytes([WHOLE[HALF] ^ 255]) + WHOLE[HALF + 1 :], DAMAGED),
    "brackets": (gzip.compress(b"[" * 100_000 + b"\n"), ANOTHER),
    "digits": (gzip.compress(b'{"runs": ' + b"1" * 100_000 + b"}\n"), ANOTHER),
    "another format": (gzip.compress(b'{"format": "l2l_implicit records", "version": 1}'), ANOTHER),
    "a name twice": (gzip.compress(b'{"runs": {"_id": 1, "_id": 2}}\n'), ANOTHER),
    "a NUL in the second line": (zipped(LINE) + gzip.compress(b'{"runs": {}}\0\n'), "f, line 2: "),
    "nothing": (None, "No such file"), "a folder": (None, "Is a directory"),
    "a FIFO": (None, "a FIFO, which would be waited for"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none(name: str, tmp_path: Path, capsys: CaptureFixture[str]) -> None:
    content, message = FILES[name]
    path = tmp_path / "f"
    if content is not None:
        path.write_bytes(content)
    elif name == "a folder":
        path.mkdir()
    elif name == "a FIFO":
        os.mkfifo(path)
    assert report_main(["--records", str(path), "--output", str(tmp_path / "report")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "report").exists()


def test_a_file_is_there_as_a_whole_or_as_it_was(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """On the disk before it takes its place, as private as the one before, and through no link."""
    path, other, link = tmp_path / "f", tmp_path / "other", tmp_path / "f.guess.new"
    path.touch(0o600)
    other.write_text("other")
    done, replace, fsync = list[str](), os.replace, os.fsync

    def noted(function: Callable[..., None], *arguments: Any) -> None:
        done.append(function.__name__)
        function(*arguments)

    def late(draft: Path, there: Path) -> None:
        """Another one begins and ends just before this one is put in place."""
        monkeypatch.setattr(os, "replace", partial(noted, replace))
        write_whole(path, b"another")
        replace(draft, there)

    monkeypatch.setattr(os, "fsync", partial(noted, fsync))
    monkeypatch.setattr(os, "replace", late)
    write_whole(path, b"new")
    assert done == ["fsync", "fsync", "replace", "fsync", "fsync"] and path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"newer")
    assert sorted(tmp_path.iterdir()) == [path, other] and path.read_bytes() == b"new"
    monkeypatch.setattr(os, "replace", replace)
    link.symlink_to(other)
    with monkeypatch.context() as patch, pytest.raises(FileExistsError):
        patch.setattr(secrets, "token_hex", lambda size: "guess")
        write_whole(path, b"newer")
    path.unlink()
    path.symlink_to(other)
    write_whole(path, b"newer")
    assert not path.is_symlink() and link.is_symlink() and other.read_text() == "other"


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_no_file_is_not_written(
    tmp_path: Path, recorder: Recorder, monkeypatch: MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    recorder.run({"seed": 1})
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    os.mkfifo(page)
    for main, words in ((export, ["/dev/null"]), (report_main, []), (export, [""])):
        assert main(words) == 1 and "the name of a file" in capsys.readouterr().err
    assert report_main(["--output", ""]) == 1 and "--output: exp" in capsys.readouterr().err


def test_a_full_disk_behind_the_output_is_one_line(
    tmp_path: Path, recorder: Recorder, monkeypatch: MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        flush = full

    recorder.run({"seed": 1})
    monkeypatch.chdir(tmp_path)
    for main, words in ((export, ["f.gz"]), (report_main, ["--output", "report"])):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Full())
            assert main(words) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "No space left" in error and error.count("\n") == 1


START, END = b'{"runs": {"_id": 1, "config": {"a": ', b"}}}\n"
BOMBS: dict[str, Callable[[], bytes]] = {
    "a line of lists": lambda: START + b"[" + b"[]," * 2**24 + b"[]]" + END,
    "lines of objects": lambda: (START + b"[" + b'{"":1},' * 2**16 + b"1]" + END) * 20,
    "texts": lambda: (START + b'"' + b"a" * 2**21 + "\U0001f600".encode() + b'"' + END) * 20,
}
"""Files of a few kB or MB that would take gigabytes."""


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_would_become_large_is_refused_before(name: str, tmp_path: Path) -> None:
    """In a process of its own, which takes less than 300 MiB for it."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(BOMBS[name](), 1))
    program = (
        "import resource, sys\n"
        "from experiments.tracking.records import FileRecords, UserError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: FileRecords([sys.argv[1]])\n"
        "except UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, text=True,
                            capture_output=True, check=True)  # fmt: skip
    error, more = answer.stdout.splitlines()
    assert "and at most 32 MiB and 1000000 values in all, got more" in error
    assert int(more) * (1 if sys.platform == "linux" else 1 / 1024) < 300 * 1024, name


def test_the_recorded_runs_of_the_docs_are_within_the_limits() -> None:
    files = sorted((ROOT / "docs" / "records").glob("*.jsonl.gz"))
    lines = {line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()}
    assert len(FileRecords(files).runs) == len(lines) > 100  # some are in two files
