"""Runs of `experiments.train` as processes of their own, and what they leave, compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.tracking.ingredient import REPOSITORY

TIMED = ("seconds", "bytes")
"""Ends of names of metrics that no two runs have in common."""

RESULT = ("test_accuracy", "test_half_width", "iterations")


class Bench:
    """A folder in which runs are started.

    Args:
        folder: of their output, and of the embedded database unless a URL is given.
        url: of a database.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self.folder, self.log = folder, folder / "log"
        own = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
               "L2L_IMPLICIT_DATA": str(folder / "data")}  # fmt: skip
        others = {k: v for k, v in os.environ.items() if not k.startswith("L2L_IMPLICIT_MONGO")}
        if url is not None:
            own["L2L_IMPLICIT_MONGO_URL"] = url
        self.environment = {**others, **own}

    def start(self, *arguments: str, module: str = "experiments.train", **variables: str
              ) -> subprocess.Popen[bytes]:  # fmt: skip
        """A process whose output goes to the log; a process group of its own, as in a shell."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=self.folder, stdout=log,
                stderr=log, env={**self.environment, **variables}, start_new_session=True,
            )  # fmt: skip

    def finish(self, *arguments: str, module: str = "experiments.train", **variables: str) -> None:
        """Run to the end.

        Raises:
            RuntimeError: the exit status is not 0.
        """
        status = self.start(*arguments, module=module, **variables).wait()
        if status != 0:
            tail = "\n".join(self.text().splitlines()[-20:])
            raise RuntimeError(f"{module} {' '.join(arguments)}: exit status {status}\n{tail}")

    def text(self) -> str:
        """All that was printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def checkpoints(self) -> list[Path]:
        """Those that there are, the newest last."""
        found = []
        for path in (self.folder / "runs").glob("*/checkpoint.pt"):
            try:
                found.append((path.stat().st_mtime_ns, path))
            except FileNotFoundError:  # removed meanwhile
                continue
        return [path for _, path in sorted(found)]

    def parameters(self, run: int) -> list[torch.Tensor]:
        """What a finished run has learnt."""
        path = self.folder / "runs" / str(run) / "parameters.pt"
        state = torch.load(path, weights_only=True)
        return [*state["theta"], *state["backbone"].values(), *state["head"].values()]


def metrics(database: Any, run: int) -> dict[str, Any]:
    """Steps and values by name, without those of time and memory."""
    found = database["metrics"].find({"run_id": run})
    return {m["name"]: (m["steps"], m["values"]) for m in found if not m["name"].endswith(TIMED)}


def same_record(database: Any, one: int, other: int) -> dict[str, bool]:
    """Whether two runs have recorded the same."""
    documents = [database["runs"].find_one({"_id": run}) for run in (one, other)]
    results = [{k: (d["result"] or {}).get(k) for k in RESULT} for d in documents]
    series = [metrics(database, run) for run in (one, other)]
    return {
        "the run is COMPLETED": documents[1]["status"] == "COMPLETED",
        "its result is the undisturbed run's": results[0] == results[1],
        f"its {len(series[0])} metrics are, to the last bit": series[0] == series[1] != {},
    }


def same_parameters(bench: Bench, one: int, other: int) -> dict[str, bool]:
    """Whether two runs have learnt the same."""
    both = [bench.parameters(run) for run in (one, other)]
    equal = all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    return {f"its {len(both[0])} parameters are, to the last bit": equal}


def report(title: str, rows: Sequence[Sequence[str]], checks: Mapping[str, bool]) -> bool:
    """Print a table and what was checked; whether all of it holds."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}\n")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print()
    for text, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {text}")
    return all(checks.values())
