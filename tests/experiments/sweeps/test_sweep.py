"""Sweeps as a user runs them: real processes, the embedded recorded. What dies: tests/drills."""

import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from typing import Any

import psutil
import pytest
from sweep_process import TOY, Place, complete
from toy_process import DEADLINE, ROOT, finish, is_alive, read_until, wait_for

from experiments import sweep
from experiments.tracking import UserError

pytest_plugins = ("sweep_process",)

TIED = ROOT / "experiments" / "sweeps" / "tied.py"


def test_a_sweep_lists_runs_chooses_retries_and_skips(place: Place, recorded: Any) -> None:
    code, output = place.run("seeds=1", "--list")
    assert code == 0 and "7 cells: 0 completed, 7 pending" in output
    assert not place.started()

    code, output = place.run("seeds=1", "--workers", "2")
    assert code == 1 and "7 cells: 6 completed, 1 failed" in output, output
    assert "dashboard: http://127.0.0.1:" in output and "Traceback" not in output
    assert "tuned: lr=0.2, of validation accuracies 90.0 100.0 100.0" in output
    assert "error: broken/final/0: failed: exit status 1: error: the toy was told to fail" in output
    assert "tuned/final/0: test accuracy 60.0 ± 1.0 %" in output
    # the final run with seed 0 is the very run of the grid: here the stages are equal
    assert len(complete(recorded)) == len(set(complete(recorded))) == 5
    # what was killed once is tried again, what failed by itself is not
    assert sorted(place.started().values()) == [1] * 5 + [2]
    assert recorded["sweep_locks"].distinct("_id") == ["database"]

    before = place.started().total()
    assert place.run("--list", "seeds=1")[1].splitlines()[-1] == "7 cells: 6 completed, 1 failed"
    code, output = place.run("seeds=1")
    assert code == 1 and "6 completed, 1 failed" in output
    assert place.started().total() == before + 1, "only what is missing runs"


def test_other_code_is_said_and_redone_only_if_asked(place: Place, recorded: Any) -> None:
    assert "other code" not in place.run("methods=plain", "seeds=1")[1]
    recorded["fs.files"].update_many({}, {"$set": {"md5": "another file"}})
    code, output = place.run("methods=plain", "seeds=1")
    assert code == 0 and "1 completed (1 by other code)" in output and "other code (" in output
    assert place.started().total() == 1
    recorded["fs.files"].delete_many({})
    code, output = place.run("methods=plain", "seeds=1", "--redo-changed")
    assert code == 0 and place.started().total() == 2, output
    assert place.run("methods=plain", "seeds=1", "--redo-changed")[0] == 0
    assert place.started().total() == 2, "the new run is of the code that is here"


def test_a_reader_that_has_seen_enough_is_no_error(place: Place) -> None:
    list_cells = f"{sys.executable} -m experiments.sweep {TOY} folder=. --list"
    code, output = finish(place.popen(["bash", "-c", f"{list_cells} | true; exit $PIPESTATUS"]))
    assert (code, output) == (128 + signal.SIGPIPE, "")


def test_the_real_training(place: Place, recorded: Any) -> None:
    code, output = place.run("seeds=1", sweep="smoke")
    assert code == 0 and "test accuracy" in output, output
    assert len(complete(recorded)) == 1
    assert "1 cells: 1 completed" in place.run("seeds=1", "--list", sweep="smoke")[1]
    (run,) = recorded["runs"].find()
    # a run's code is the same, whoever starts it
    assert not [name for name, _ in run["experiment"]["sources"] if "sweep" in name]
    # and so is its time: Dask's workers give memory back, which a training must not
    assert run["info"]["keeps_freed_memory"] == (platform.libc_ver()[0] == "glibc")


def test_a_dry_run_names_the_setting_that_is_refused(place: Place) -> None:
    code, output = place.run("methods=plain", "some.lr=3", "--dry-run")
    assert code == 1 and "plain/final/0: error: no configuration entry 'some" in output, output
    assert not place.started()
    assert place.run("methods=plain", "--dry-run") == (0, "plain/final/0: fine\n")


def test_no_scheduler_is_one_line(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a silent one, for which Dask itself waits, as for a file; nor another server."""
    code, output = place.run("methods=plain", "--scheduler", "tcp://127.0.0.1:1")
    line = output.splitlines()[-1]
    assert code == 1 and line.startswith("error: --scheduler: expected the address"), output
    assert "Traceback" not in output and "distributed" not in output
    monkeypatch.setattr(sweep, "CONNECT", 1.0)
    (place.folder / "list.json").write_text("[1]")
    os.mkfifo(place.folder / "fifo.json")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as other:
        silent, web = (f"tcp://127.0.0.1:{s.getsockname()[1]}" for s in (one, other))
        answer = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        threading.Thread(target=lambda: other.accept()[0].sendall(answer), daemon=True).start()
        files = (f"{place.folder}/{name}.json" for name in ("none", "list", "fifo"))
        for address in ("a b", "x://y", "", *files, silent, web):
            with pytest.raises(UserError, match=f"--scheduler: .*, got '{address}'"):
                sweep.connected(address, 1)


def test_a_tied_module_is_the_main_program_until_its_starter_lets_go(place: Place) -> None:
    """The end of standard input is all that it knows of where there is no prctl."""
    (place.folder / "module.py").write_text(
        "import sys, time; print(__name__, sys.argv[1:], flush=True); time.sleep(600)"
    )
    process = place.popen([sys.executable, str(TIED), "module", "a"], stdin=subprocess.PIPE)
    assert read_until(process, "\n") == "__main__ ['a']\n"
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(DEADLINE) == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_stopped_tied_module_dies_with_its_starter(place: Place) -> None:
    (place.folder / "module.py").write_text(
        "import os, signal; print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    )
    words = f"[sys.executable, {str(TIED)!r}, 'module'], stdin=subprocess.PIPE"
    starter = place.popen(
        [sys.executable, "-c", f"import subprocess, sys; p = subprocess.Popen({words}); p.wait()"]
    )
    child = psutil.Process(int(read_until(starter, "\n")))
    wait_for(lambda: child.status() == psutil.STATUS_STOPPED)
    starter.kill()
    wait_for(lambda: not is_alive(child.pid))
