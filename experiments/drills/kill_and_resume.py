"""Kill a run at random moments, resume it each time, and compare its end with an undisturbed one.

    python -m experiments.drills.kill_and_resume
    python -m experiments.drills.kill_and_resume --kills 5 --seed 1 --folder DRILL

Exit status 0 if the parameters and metrics are the same to the last bit and every killed run is
marked; 1 if not.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from experiments.drills.runs import Bench, report, same_parameters, same_record
from experiments.tracking import open_database

SETTINGS = ("with", "smoke", "anil", "iterations=60", "validate_every=3", "checkpoint_seconds=0.05")

STARTING = 0.2
"""The share of kills while a run starts, before its own first checkpoint."""


class Kill(NamedTuple):
    """One SIGKILL: seconds from the start or the first checkpoint, and what it left."""

    after: float
    iterations: int | None
    torn: bool

    def row(self, number: int) -> list[str]:
        """For the table."""
        left = "no checkpoint" if self.iterations is None else f"iteration {self.iterations}"
        return [str(number), f"{self.after:.2f}", left, "in a checkpoint" if self.torn else ""]


def drill(folder: Path, kills: int, seed: int, settings: Sequence[str] = SETTINGS) -> bool:
    """Whether the killed run ends as the undisturbed one does."""
    bench = Bench(folder)
    os.environ["L2L_IMPLICIT_DATA"] = bench.environment["L2L_IMPLICIT_DATA"]
    os.environ.pop("L2L_IMPLICIT_MONGO_URL", None)
    length = _undisturbed(bench, settings)
    seen = _kill_again_and_again(bench, settings, kills, random.Random(seed), length)
    last = max(int(path.parent.name) for path in (folder / "runs").glob("*/parameters.pt"))
    with open_database() as database:
        checks = {
            f"run {last} is not the undisturbed run 1": last > 1,
            **same_parameters(bench, 1, last),
            **same_record(database, 1, last),
            **_marks(database, last),
        }
    rows = [["kill", "seconds", "left", ""], *(k.row(i) for i, k in enumerate(seen, 1))]
    return report(f"{len(seen)} kills of one run, seed {seed}, in {folder}", rows, checks)


def _undisturbed(bench: Bench, settings: Sequence[str]) -> float:
    """Seconds from its first checkpoint to its end."""
    process = bench.start(*settings)
    _wait_for_checkpoint(bench, process, None)
    began = time.monotonic()
    if process.wait() != 0:
        raise RuntimeError(f"the undisturbed run fails; see {bench.log}")
    return time.monotonic() - began


def _wait_for_checkpoint(
    bench: Bench, process: subprocess.Popen[bytes], known: Path | None
) -> None:
    """Until there is one newer than ``known``, or the process has ended."""
    while bench.checkpoints()[-1:] in ([], [known]) and process.poll() is None:
        time.sleep(0.02)


def _kill_again_and_again(
    bench: Bench, settings: Sequence[str], kills: int, draw: random.Random, length: float
) -> list[Kill]:
    seen: list[Kill] = []
    process = bench.start(*settings)
    with tqdm(total=kills, desc="kills", unit="kill") as bar:
        while len(seen) < kills:
            known = bench.checkpoints()[-1:]
            if draw.random() < STARTING:
                killed = _kill(bench, process, draw.uniform(0.0, 10.0))
            else:
                _wait_for_checkpoint(bench, process, known[0] if known else None)
                killed = _kill(bench, process, draw.uniform(0.0, 2.0 * length / kills))
            if killed is not None:
                seen.append(killed)
                bar.update()
            process = bench.start(*(["resume=latest"] if bench.checkpoints() else settings))
    while process.wait() != 0:
        process = bench.start("resume=latest")
    return seen


def _kill(bench: Bench, process: subprocess.Popen[bytes], after: float) -> Kill | None:
    """SIGKILL after so many seconds; None if the process has ended before."""
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    if process.wait() != -signal.SIGKILL:
        return None
    left = bench.checkpoints()
    steps = torch.load(left[-1], weights_only=True)["steps"] if left else None
    torn = list((bench.folder / "runs").glob("*/checkpoint.new"))
    for path in torn:
        path.unlink()
    return Kill(after, steps, bool(torn))


def _marks(database: Any, last: int) -> dict[str, bool]:
    """Whether the database tells which runs were killed, and which went on from which."""
    others = [d for d in database["runs"].find() if d["_id"] != last]
    killed = [d for d in others if d["status"] != "COMPLETED"]
    pointing = {d["_id"]: str(d["info"]["resumes"]) for d in database["runs"].find()
                if "resumes" in d["info"]}  # fmt: skip
    pointed = {d["_id"]: d["info"].get("resumed_by") for d in killed}
    return {
        f"all {len(killed)} killed runs are marked FAILED or INTERRUPTED":
            {d["status"] for d in killed} <= {"FAILED", "INTERRUPTED"},
        f"run {last} points to the run it goes on from, which points back":
            last in pointing and pointed.get(int(pointing[last])) == last,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.drills.kill_and_resume",
        description="Kill a run at random moments, resume it, compare its end.",
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="of runs and database; else a temporary one")
    given = parser.parse_args(argv)
    if given.folder is not None:
        given.folder.mkdir(parents=True)
        sys.exit(not drill(given.folder.absolute(), given.kills, given.seed))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sys.exit(not drill(Path(folder), given.kills, given.seed))


if __name__ == "__main__":
    main()
