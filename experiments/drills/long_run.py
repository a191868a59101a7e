"""Train for thousands of outer iterations on a tiny problem, and watch memory and documents.

    python -m experiments.drills.long_run
    python -m experiments.drills.long_run --iterations 2000

Exit status 0 if the process grows by less than 1 MB (10**6 bytes) in 1,000 iterations, and no
document of the run reaches MongoDB's 16 MB; 1 if not.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import bson
from tqdm import tqdm

from experiments.drills.runs import Bench, report
from experiments.tracking import open_database

SETTINGS = ("with", "sine", "rm_metal", "tasks.shots=5", "tasks.queries=5", "meta_batch=1",
            "algorithm.steps=1", "algorithm.cg_steps=1", "validation_tasks=2", "test_tasks=2",
            "model.hidden=8", "validate_every=500", "checkpoint_seconds=5")  # fmt: skip
LARGEST_SLOPE = 1e6
LARGEST_DOCUMENT = 16 * 2**20
POLL = 1.0
WARM = 0.2
"""The share of the run before which memory is not looked at: caches fill, modules load."""


def resident(process: int) -> int:
    """Bytes in memory of a process (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def slope(points: Sequence[tuple[int, int]]) -> float:
    """Least squares: bytes for each 1,000 iterations."""
    n = len(points)
    x, y = (sum(column) / n for column in zip(*points, strict=True))
    above = sum((i - x) * (size - y) for i, size in points)
    return 1000 * above / sum((i - x) ** 2 for i, _ in points)


def drill(folder: Path, iterations: int) -> bool:
    """Whether nothing grows."""
    bench = Bench(folder)
    os.environ["L2L_IMPLICIT_DATA"] = bench.environment["L2L_IMPLICIT_DATA"]
    os.environ.pop("L2L_IMPLICIT_MONGO_URL", None)
    seen = _watch(bench, iterations)
    warm = [point for point in seen if point[0] >= WARM * iterations]
    growth = slope(warm)
    with open_database() as database:
        (run,) = database["runs"].find()
        sizes = {name: max(len(bson.encode(d)) for d in database[name].find())
                 for name in ("runs", "metrics")}  # fmt: skip
    at = [warm[i * (len(warm) - 1) // 8] for i in range(9)]
    rows = [["iteration", "resident MB"], *([str(i), f"{size / 1e6:.1f}"] for i, size in at)]
    return report(
        f"{iterations} outer iterations; slope {growth / 1e6:+.3f} MB per 1,000 from iteration "
        f"{warm[0][0]} on; largest documents: run {sizes['runs']} bytes, "
        f"metric {sizes['metrics']} bytes",
        rows,
        {
            "the run is COMPLETED": run["status"] == "COMPLETED",
            f"slope below {LARGEST_SLOPE / 1e6:g} MB per 1,000 iterations": growth < LARGEST_SLOPE,
            "every document below 16 MB": max(sizes.values()) < LARGEST_DOCUMENT,
        },
    )


def _watch(bench: Bench, iterations: int) -> list[tuple[int, int]]:
    """(iteration, bytes in memory) about once a second."""
    process = bench.start(*SETTINGS, f"iterations={iterations}")
    journals = Path(bench.environment["L2L_IMPLICIT_DATA"]) / "journals"
    seen: list[tuple[int, int]] = []
    done, position = 0, 0
    with tqdm(total=iterations, desc="iterations", unit="iteration") as bar:
        while process.poll() is None:
            for path in journals.glob("*.jsonl"):
                with suppress(FileNotFoundError):  # it has just been uploaded
                    done, position = _count(path, done, position)
                    seen.append((done, resident(process.pid)))
            bar.update(done - bar.n)
            try:
                process.wait(POLL)
            except subprocess.TimeoutExpired:
                continue
    if process.returncode != 0:
        raise RuntimeError(f"the run fails; see {bench.log}")
    # The test and the pictures come after the last iteration; an ended process has 0 bytes.
    return [(done, size) for done, size in seen if size > 0 and done < iterations]


def _count(journal: Path, done: int, position: int) -> tuple[int, int]:
    """Iterations recorded so far, and where to read on."""
    with journal.open("rb") as file:
        file.seek(position)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return done + whole.count(b'"train/query_loss"'), position + len(whole)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.drills.long_run",
        description="Train for long on a tiny problem; watch memory and documents.",
    )
    parser.add_argument("--iterations", type=int, default=5000)
    parser.add_argument("--folder", type=Path, help="of run and database; else a temporary one")
    given = parser.parse_args(argv)
    if given.folder is not None:
        given.folder.mkdir(parents=True)
        sys.exit(not drill(given.folder.absolute(), given.iterations))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sys.exit(not drill(Path(folder), given.iterations))


if __name__ == "__main__":
    main()
