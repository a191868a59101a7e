"""Cells, plans, states and locks without processes of their own."""

import math
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytest import MonkeyPatch

from experiments import sweep
from experiments.sweeps import definition
from experiments.sweeps import lock as locks
from experiments.sweeps.definition import Benchmark, Cell, Method, Sweep
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.listing import Status, duration, remaining
from experiments.sweeps.lock import Lock, Watch, token_of
from experiments.sweeps.plan import Plan, best, find_sweep, make_plan
from experiments.sweeps.run import find_checkpoint, open_log
from experiments.sweeps.runs import Run
from experiments.tracking import UserError
from experiments.tracking.config import plain_value
from experiments.tracking.database import Choice, Database


def cell(**settings: object) -> Cell:
    return Cell("experiments.train", ("glyphs", "anil"), settings)


def cells_of(plan: Plan) -> tuple[list[Cell], list[Cell]]:
    """Those of the grids, and those of the final runs of every candidate."""
    parts = [part for group in plan.groups for part in group.finals]
    return tuple([c for cells in found for c in cells.values()]
                 for found in ([group.grid for group in plan.groups], parts))  # fmt: skip


def test_the_identity_is_of_what_is_run_not_of_where() -> None:
    one = cell(**{"algorithm.lr": 0.1, "seed": 0})
    assert one.identity == cell(**{"seed": 0, "algorithm.lr": 0.1}).identity
    assert one.identity == cell(**{"algorithm.lr": 1e-1, "seed": 0.0}).identity
    assert one.identity == cell(**{"algorithm.lr": 0.1, "seed": 0, "tasks.root": "/x"}).identity
    others = [cell(**{"algorithm.lr": 0.1, "seed": 1}), cell(**{"algorithm.lr": "0.1", "seed": 0}),
              Cell("experiments.train", ("anil", "glyphs"), one.settings), cell(seed=True)]
    assert len({one.identity, *(other.identity for other in others)}) == 5
    assert plain_value(one.identity) == one.identity, "Sacred would read it as a number"
    own = [Cell("experiments.train", configs, {**named, "tasks.root": root}) for root in "xy"
           for configs, named in ((("folder",), {}), ((), {"tasks.name": "folder"}))]  # fmt: skip
    assert len({other.identity for other in own}) == 4, "images of one's own: another folder"


@pytest.mark.parametrize("value", [1, 0.1, 1e-05, True, None, [1500], "cpu", "1", "True", "a b"])
def test_values_survive_the_command_line(value: object) -> None:
    assert definition.parse_settings([f"key={definition.format_value(value)}"]) == {"key": value}


@pytest.mark.parametrize("name", list(SWEEPS))
def test_every_definition_gives_different_cells(name: str) -> None:
    for benchmark in SWEEPS[name].benchmarks:
        for grid in ({}, {"grid": "paper"}) if name == "yang_table1" else ({},):
            plan = make_plan(SWEEPS[name], {"benchmark": benchmark, **grid})
            grids, finals = cells_of(plan)
            for cells in (grids, finals):
                assert len({c.identity for c in cells}) == len(cells)
            assert all(type(c.settings["seed"]) is int for c in grids + finals)


@pytest.mark.parametrize(("name", "benchmark"), [
    (name, benchmark) for name in ("accuracy", "yang_quarter")
    for benchmark in SWEEPS[name].benchmarks
])  # fmt: skip
def test_the_comparison_is_fair(name: str, benchmark: str) -> None:
    """Equal grids and equal budgets, 3 settings, 3 seeds; the outer step for all."""
    plan = make_plan(SWEEPS[name], {"benchmark": benchmark})
    assert len(plan.names()) == len(SWEEPS[name].methods) * (3 + 3)
    for key, method in SWEEPS[name].methods.items():
        if key == "protonet":  # which has an outer step size alone
            assert [list(c) for c in method.grid] == 3 * [["meta_lr"]]
            continue
        assert [len(c) for c in method.grid] == [1, 1, 2]
        assert [c for c in method.grid if "meta_lr" in c] == [method.grid[2]]
    grids, finals = cells_of(plan)
    assert len({(c.settings["budget"], c.settings["meta_batch"]) for c in grids}) == 1
    if name == "accuracy":
        assert {c.settings["budget"] for c in finals} == {2 * grids[0].settings["budget"]}
    else:  # equal tasks; equal time where an outer step costs many times as much
        assert {c.settings["iterations"] for c in finals} == {500}
        whole = [c for c in finals if {"maml", "maml_msl", "meta_sgd"} & {*c.configs}]
        assert {c.settings["budget"] for c in whole} == {900}
        assert {c.settings.get("budget") for c in finals if c not in whole} == {None}


def test_a_quarter_and_the_whole_share_their_grids() -> None:
    for benchmark in SWEEPS["yang_quarter"].benchmarks:
        given = {"benchmark": benchmark, "methods": "ImplicitCGHead"}
        quarter, whole = (make_plan(SWEEPS[n], given) for n in ("yang_quarter", "yang_table1"))
        one, other = ([c.identity for c in cells_of(plan)[0]] for plan in (quarter, whole))
        assert one == other


def test_a_method_s_settings_beat_the_stage_s_and_the_benchmark_s_beat_both() -> None:
    sweep = Sweep(
        {"a": Method(("a",), final={"tests": 6, "x": 1}), "b": Method(("b",), final={"tests": 6})},
        {"here": Benchmark(methods={"b": {"tests": 5}})}, stage2={"budget": 4, "tests": 7}, seeds=1,
    )  # fmt: skip
    (a,), (b,) = [group.finals for group in make_plan(sweep, {}).groups]
    assert a["a/final/0"].settings == {"budget": 4, "seed": 0, "tests": 6, "x": 1}
    assert b["b/final/0"].settings == {"budget": 4, "seed": 0, "tests": 5}


def test_settings_of_the_command_line_reach_every_cell() -> None:
    plan = make_plan(SWEEPS["accuracy"], {"methods": "anil", "budget": 9, "tasks.root": "data"})
    grid, finals = cells_of(plan)
    set_here = {(c.settings["budget"], c.settings["tasks.root"]) for c in grid + finals}
    assert set_here == {(9, "data")}
    assert [c.settings["algorithm.lr"] for c in grid] == [0.1, 0.03, 0.1]


def test_the_trainings_own_entries_are_no_misspelt_options() -> None:
    for key in ("iterations", "meta_batch", "meta_lr", "budget", "validate_every", "test_tasks",
                "validation_tasks", "threads", "output", "test_at", "checkpoint_seconds"):
        make_plan(SWEEPS["smoke"], {key: 1})


BAD = {
    "acuracy": "did you mean 'accuracy'?",
    "nothing.py": "no file nothing.py",
    "accuracy benchmark=caltech": "did you mean 'caltech101'?",
    "accuracy benchmrk=glyphs": "did you mean 'benchmark'?",
    "accuracy methods=anil,mamll": "did you mean 'maml'?",
    "accuracy seeds=0": "seeds: expected a number of seeds from 1 to 1000, got 0",
    "accuracy seeds=1000000000": "seeds: expected a number of seeds from 1 to 1000",
    "accuracy methods=anil --cell=": "no cell ''", "accuracy a/b=1": "no configuration entry 'a/b'",
    "accuracy seed=1": "the number of seeds is seeds=N",
    "accuracy algorithm.lr=0.1": "algorithm.lr is what the grid of itd_bio searches",
    "accuracy glyphs": "expected KEY=VALUE, got 'glyphs'",
    "accuracy seeds=1 seeds=2": "seeds is given twice",
    "yang_table1 grid=papr": "did you mean 'paper'?",
    "accuracy --cell anil/final/7": "did you mean 'anil/final/",
    "smoke --workers 0": "--workers: expected at least 1",
    "smoke --workers 2 --scheduler 127.0.0.1:1": "--workers: expected at least 1",
}


@pytest.mark.parametrize("words", list(BAD))
def test_bad_input_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(words.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD[words] in error


@pytest.fixture
def database(tmp_path: Path, monkeypatch: MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path))
    with closing(Database(Choice(None, "embedded"))) as database:
        yield database


def taken_elsewhere(database: Database, monkeypatch: MonkeyPatch) -> Lock:
    """The lock of cell c1, held by scheduler s on another machine, where its file is too."""
    monkeypatch.setattr(locks, "_place", lambda: "elsewhere")
    holder = Lock(database, "c1", "s")
    assert holder.take()
    monkeypatch.setattr(locks, "_place", lambda: "here")
    os.close(holder.descriptor)
    return holder


def test_a_lock_has_one_holder(database: Database) -> None:
    first, second = Lock(database, "c1", "s"), Lock(database, "c1", "s")
    assert first.take() and not second.take()
    assert first.take(), "a holder whose answer got lost asks again"
    assert Lock(database, "c2", "s").take(), "another cell is another lock"
    assert list(Watch(database).holders(["c1", "c3"])) == ["c1"]
    assert first.beat() and not second.beat()
    first.release()
    first.close()
    assert not Watch(database).holders(["c1"]) and not first.beat()
    assert second.take() and second.beat()


def test_a_dead_holder_here_loses_its_lock_at_once(database: Database) -> None:
    dead, other = Lock(database, "c1", "s"), Lock(database, "c1", "another scheduler")
    assert dead.take()
    os.close(dead.descriptor)  # as the kernel does
    assert not Watch(database).holders(["c1"])
    assert other.take() and not dead.beat(), "should it live, it is told and stops its training"


def test_a_holder_elsewhere_has_a_whole_lease(database: Database, monkeypatch: MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    holder = taken_elsewhere(database, monkeypatch)
    other, watch = Lock(database, "c1", "another"), Watch(database)
    for _ in range(12):
        now[0] += locks.LEASE / 5
        assert watch.holders(["c1"]) and not other.take()
        assert holder.beat()
    watch.holders(["c1"])
    now[0] += locks.LEASE + 1  # not looked at: the database was away, for the holder too
    assert watch.holders(["c1"])
    seen = now[0]
    while now[0] < seen + locks.LEASE:
        assert watch.holders(["c1"])
        now[0] += locks.LEASE / 8
    now[0] += 1
    assert not watch.holders(["c1"])
    assert other.take() and not holder.beat()


def test_a_scheduler_gives_a_lost_cell_again(database: Database, monkeypatch: MonkeyPatch) -> None:
    lost = taken_elsewhere(database, monkeypatch)
    assert not Lock(database, "c1", "another").take()
    assert Lock(database, "c1", "s").take() and not lost.beat()


def test_a_database_has_a_token(
    database: Database, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "other"))
    with closing(Database(Choice(None, "embedded"))) as other:
        assert token_of(database) == token_of(database) != token_of(other)
        for one in (database, other):  # as a document of another shape has none
            one.documents["sweep_locks"].replace_one({"_id": "database"}, {"a": 1})
        assert token_of(database) == token_of(database) != token_of(other)


KILLED = ["killed: the process ended without a word (kill -9, out of memory, power)"]


@pytest.mark.parametrize(("status", "trace", "state"), [
    ("RUNNING", None, "running"), ("COMPLETED", None, "completed"), ("FAILED", None, "failed"),
    ("INTERRUPTED", None, "interrupted"), ("TIMEOUT", None, "interrupted"),
    ("FAILED", KILLED, "interrupted"),
    ("FAILED", ["Traceback", "ValueError: killed: no"], "failed"),
])  # fmt: skip
def test_states_are_those_of_sacred(status: str, trace: list[str] | None, state: str) -> None:
    assert Run({"_id": 1, "status": status, "fail_trace": trace}).state == state


def test_the_time_left_is_of_all_that_is_to_run() -> None:
    """Also of what was killed or failed, which the same command runs again."""
    times = {"start_time": "2026-01-01T00:00:00+00:00", "stop_time": "2026-01-01T00:10:00+00:00"}
    run = Run({"_id": 1, "status": "COMPLETED", **times})
    done = Status("a/final/0", cell(), definition.COMPLETED, run)
    like = [Status("a/final/1", cell(), s) for s in definition.STATES if s != definition.COMPLETED]
    other = Status("b/final/0", cell(), definition.INTERRUPTED)
    assert remaining([done], 1) == "about 0 s with 1 worker"
    for status in like:
        assert remaining([done, status], 1) == "about 10 min with 1 worker"
    assert remaining([done, *like], 2) == "about 20 min with 2 workers"
    assert remaining([done, *like, other], 2) == "at least 20 min with 2 workers"
    assert remaining([done, other], 1) == "of unknown length"


def test_a_checkpoint_is_found_by_its_cell(tmp_path: Path) -> None:
    mine = cell(output=str(tmp_path), seed=0)
    for number, identity in (("1", mine.identity), ("2", "c0"), ("3", mine.identity)):
        (tmp_path / number).mkdir()
        (tmp_path / number / "config.json").write_text(f'{{"cell": "{identity}"}}')
        if number < "3":
            (tmp_path / number / "checkpoint.pt").touch()
    for number, damaged in (("4", "[1]"), ("5", "{"), ("6", ""), ("7", "[" * 100_000), ("8", None)):
        (tmp_path / number).mkdir()
        (tmp_path / number / "checkpoint.pt").touch()
        if damaged is None:
            os.mkfifo(tmp_path / number / "config.json")
        else:
            (tmp_path / number / "config.json").write_text(damaged)
    assert find_checkpoint(mine, [3, 4, 5, 6, 7, 8, "x" * 999, 2, 1]) == tmp_path / "1"
    for elsewhere in (f"{tmp_path}/1", "../1", "2/../1", "", "."):
        assert find_checkpoint(cell(output=str(tmp_path / "1"), seed=0), [elsewhere]) is None
    assert find_checkpoint(mine, [3, 2, 9]) is None


def test_a_log_is_a_file_and_no_link(tmp_path: Path) -> None:
    """In a folder that others can write to, it would add to any file of one's own."""
    for line in ("first", "second\udcff"):
        with open_log(tmp_path / "log") as log:
            print(line, file=log)
    assert (tmp_path / "log").read_text() == "first\nsecond\\udcff\n"
    (tmp_path / "link").symlink_to("log")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError, match=name):
            open_log(tmp_path / name)


def test_small_things() -> None:
    assert best([0.5, 0.7, 0.7]) == 1
    assert best([-math.inf, 0.2]) == 1, "a diverged setting never wins"
    assert [duration(s) for s in (3.2, 600, 11100)] == ["3 s", "10 min", "3 h 05 min"]
    with pytest.raises(UserError, match="must define SWEEP"):
        find_sweep(__file__)


PARTS = {"methods": {"a": Method(())}, "benchmarks": {"b": Benchmark()}}
NO_PART = "has a method and a benchmark, and each grid has"


@pytest.mark.parametrize(("changes", "message"), [
    ({"methods": {}}, NO_PART), ({"benchmarks": {}}, NO_PART),
    ({"methods": {"a": Method((), grid=())}}, NO_PART),
    ({"methods": {"a": Method((), grids={"other": ()})}}, NO_PART),
    ({"benchmarks": {"b": Benchmark(methods={"aa": {}})}}, "no method 'aa'; did you mean 'a'?"),
    ({"settings": {"seed": 1}}, "seed is set by the sweep"),
    ({"settings": {"cell": 1}}, "cell is set by the sweep"),
])  # fmt: skip
def test_a_sweep_of_other_parts_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(Sweep(**{**PARTS, **changes}), {})


def test_methods_are_those_of_the_sweep_whatever_they_are_called() -> None:
    names = ["a b", "c, d"]
    sweep = Sweep(**{**PARTS, "methods": dict.fromkeys(names, Method(()))})
    assert [group.name for group in make_plan(sweep, {}).groups] == names
    assert [group.name for group in make_plan(sweep, {"methods": " a b "}).groups] == names[:1]


OWN = """import numpy as np
from experiments.sweeps.definition import Benchmark, Method, Sweep
"""


@pytest.mark.parametrize(("text", "message"), [
    ("1/0", "ZeroDivisionError: division by zero"), ("import sys; sys.exit(0)", "SystemExit: 0"),
    ("SWEEP = (", r"SyntaxError: .* \(.*mine.py, line 1\)"), ("\0", "null bytes"),
    (OWN + "Method('anil')", r"valid tuple .* \(.*mine.py, line 3\)"),
    (OWN + "Method((), grid=({'a': np.arange(2)[1]},))", "not a valid JSON value"),
    (OWN + "Method((), settings={'a': {1, 2}})", "not a valid JSON value"),
    (OWN + "Sweep({'a': 'anil'}, {'b': Benchmark()})", "an instance of Method"),
    *((OWN + one, "gird Unexpected keyword argument") for one in (
        "Method((), gird=({},))", "Benchmark(gird=1)", "Sweep({'a': Method(())}, {}, gird=1)")),
    (OWN + "Sweep({}, {}, seeds=True)", "seeds Input should be a valid integer"),
])  # fmt: skip
def test_a_sweep_s_file_that_fails_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        find_sweep(str(tmp_path / "mine.py"))
    assert "\n" not in str(caught.value)


def test_the_sweep_of_the_docs_is_one(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "sweeps.md").read_text()
    path = tmp_path / "mine.py"
    path.write_text(text.split("```python\n")[1].split("```")[0])
    names = make_plan(find_sweep(str(path)), {"seeds": 1}).names()
    assert names == ["anil/grid/0", "anil/grid/1", "anil/final/0"]
