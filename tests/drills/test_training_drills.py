"""A run that is killed again and again, and one that is long. `-s` shows what was seen."""

import random
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any

import bson
import psutil
import pytest
from scipy.stats import linregress
from train_process import Bench, assert_same
from warm_process import Warm

from experiments.tracking import open_database
from experiments.training import checkpoint

pytest_plugins = ("train_process",)
SETTINGS = ("with", "smoke", "anil", "iterations=60", "validate_every=3", "checkpoint_seconds=0.05")
STARTING = 0.2
"""The share of kills while a run starts, before its own first checkpoint."""

TINY = ("with", "sine", "rm_metal", "tasks.shots=5", "tasks.queries=5", "meta_batch=1",
        "algorithm.steps=1", "algorithm.cg_steps=1", "validation_tasks=2", "test_tasks=2",
        "model.hidden=8", "validate_every=500", "checkpoint_seconds=5")  # fmt: skip
WARM = 0.2
"""The share of a long run before which memory is not looked at: caches fill, modules load."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_at_twenty_random_moments(bench: Bench, seed: int, kills: int = 20) -> None:
    """In a step, a checkpoint, a validation, a database write, a start: wherever it falls."""
    process, _ = bench.started(*SETTINGS)
    began = time.monotonic()
    assert process.wait() == 0, bench.text()
    pause = 2.0 * (time.monotonic() - began) / kills
    draw, seen, process = random.Random(seed), 0, bench.start(*SETTINGS)
    while seen < kills:
        known = bench.checkpoints()[-1:]
        if draw.random() < STARTING:
            seen += killed(bench, process, draw.uniform(0.0, 10.0))
        else:
            while bench.checkpoints()[-1:] in ([], known) and process.poll() is None:
                time.sleep(0.02)
            seen += killed(bench, process, draw.uniform(0.0, pause))
        process = bench.start(*(["resume=latest"] if bench.checkpoints() else SETTINGS))
    while process.wait() != 0:
        process = bench.start("resume=latest")
    last = max(int(path.parent.name) for path in bench.folder.glob("runs/*/parameters.pt"))
    assert last > 1 and not list(bench.folder.glob(f"runs/{last}/*.new"))
    with open_database() as database:
        assert_same(bench, database, 1, last)
        assert_marked(database, last)


def killed(bench: Bench, process: Warm, after: float) -> bool:
    """SIGKILL after so many seconds; False if the process has ended before."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(after)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        return False
    left = bench.checkpoints()
    steps = checkpoint.load(left[-1].parent)["steps"] if left else None
    torn = "in a checkpoint" if list(bench.folder.glob("runs/*/*.new")) else ""
    print(f"killed after {after:5.2f} s, checkpoint of iteration {steps} {torn}")
    return True


def assert_marked(database: Any, last: int) -> None:
    """The database tells which runs were killed, and which went on from which."""
    runs = {run["_id"]: run for run in database["runs"].find()}
    others = [run for run in runs.values() if run["_id"] != last and run["status"] != "COMPLETED"]
    assert {run["status"] for run in others} <= {"FAILED", "INTERRUPTED"}
    before = runs[int(runs[last]["info"]["resumes"])]
    assert before["info"]["resumed_by"] == last


@pytest.mark.slow
def test_a_long_run_does_not_grow(bench: Bench, iterations: int = 20_000) -> None:
    """By less than 1 MB (10**6 bytes) in 1,000; no document reaches MongoDB's 16 MB.

    The allocator keeps what it once had, in steps of some MB: a short run cannot tell.
    """
    seen = watch(bench, iterations)
    warm = [point for point in seen if point[0] >= WARM * iterations]
    for at, size in warm[:: max(1, len(warm) // 8)]:
        print(f"iteration {at:6}: {size / 1e6:.1f} MB resident")
    with open_database() as database:
        (run,) = database["runs"].find()
        sizes = {name: max(len(bson.encode(d)) for d in database[name].find())
                 for name in ("runs", "metrics")}  # fmt: skip
    slope = 1000 * linregress(*zip(*warm, strict=True)).slope
    print(f"slope {slope / 1e6:+.3f} MB per 1,000 iterations, largest documents {sizes}")
    assert run["status"] == "COMPLETED" and max(sizes.values()) < 16 * 2**20
    assert slope < 1e6


def watch(bench: Bench, iterations: int) -> list[tuple[int, int]]:
    """(iteration, bytes in memory) about once a second."""
    process = bench.start(*TINY, f"iterations={iterations}")
    seen: list[tuple[int, int]] = []
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
        shown = bench.text().replace("\r", "\n").rpartition("meta-training: ")[2]
        done = shown.rpartition(f"/{iterations}")[0].rpartition(" ")[2]
        if done.isdecimal() and int(done) < iterations:  # the test and the pictures come after it
            with suppress(psutil.NoSuchProcess):
                seen.append((int(done), psutil.Process(process.pid).memory_info().rss))
    assert process.wait() == 0, bench.text()
    return [(done, size) for done, size in seen if size > 0]  # an ended process has 0 bytes
