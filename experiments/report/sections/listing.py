"""How many runs there are and which sweeps they belong to; every run, complete or not."""

from __future__ import annotations

import math
from collections import Counter
from datetime import datetime, timezone

from experiments.report.content import (
    MISSING,
    Column,
    Record,
    Section,
    Source,
    Table,
    file_name,
    number,
    text_column,
    texts,
)
from experiments.report.runs import Run, command_of, is_number
from experiments.report.summary import Request
from experiments.report.sweep_state import COMPLETED, FAILED, INTERRUPTED, RUNNING, SweepState
from experiments.sweeps.listing import duration

SILENT = 600.0
"""Seconds without a heartbeat after which a running run may have been killed."""

FOLDED_FROM = 40


def overview(request: Request) -> list[Section]:
    """Always there, also for an empty database."""
    runs = request.archive.runs
    counts = Counter(run.status for run in runs)
    told = ", ".join(f"{number} {status}" for status, number in counts.most_common())
    text = [f"{len(runs)} runs: {told}." if runs else "There are no runs yet."]
    codes = {name: {run.code.signature for run in runs if run.experiment == name}
             for name in sorted({run.experiment for run in runs})}  # fmt: skip
    several = [f"{name} of {len(found)}" for name, found in codes.items() if len(found) > 1]
    if several:
        text.append(
            f"Versions of the code: runs of {', '.join(several)}. Runs of different code or"
            " settings are in rows of their own, or a line beside the table says what differs."
        )
    return [Section("Overview", tuple(text), (_sweeps(request),) if request.sweeps else ())]


def _sweeps(request: Request) -> Table:
    return Table(
        "sweeps",
        "The sweeps, and how many of their cells there are.",
        (*texts("sweep", "benchmark", "completed", "running", "interrupted", "failed"),
         text_column("command that fills it", "command")),
        tuple(_sweep_record(state) for state in request.sweeps),
        Source("python -m experiments.sweep SWEEP benchmark=NAME",
               tuple(run.id for state in request.sweeps for run in state.attempts)),
    )  # fmt: skip


def _sweep_record(state: SweepState) -> Record:
    counts = Counter(cell.state for cell in state.cells)
    return {
        "sweep": state.name,
        "benchmark": state.benchmark,
        "completed": f"{counts[COMPLETED]} of {len(state.cells)}",
        "running": counts[RUNNING] or "",
        "interrupted": counts[INTERRUPTED] or "",
        "failed": counts[FAILED] or "",
        "command": state.command(),
    }


def all_runs(request: Request) -> list[Section]:
    """One table an experiment, newest run first."""
    names = {
        cell.cell.identity: f"{state.name} {state.benchmark} {cell.name}"
        for state in request.sweeps for cell in state.cells if cell.cell is not None
    }  # fmt: skip
    experiments = sorted({run.experiment for run in request.archive.runs})
    tables = tuple(_table(e, request.archive.of_experiment(e), names) for e in experiments)
    return [Section("All runs", (), tables)] if tables else []


def _table(experiment: str, runs: list[Run], cells: dict[str, str]) -> Table:
    columns = (
        *texts("run", "status", "what"),
        text_column("started (UTC)", "started"),
        text_column("took", "took"),
        text_column("result", "shown"),
        *texts("code", "remarks"),
        Column("command", lambda r: "" if r["cell"] else r["command"], text=True),
    )
    return Table(
        file_name("runs", experiment or "unnamed"),
        f"Runs of {experiment or 'an experiment without a name'}, the newest first.",
        columns,
        tuple(_record(run, cells) for run in reversed(runs)),
        Source(command_of(experiment), tuple(run.id for run in runs)),
        folded=len(runs) >= FOLDED_FROM,
    )


def _record(run: Run, cells: dict[str, str]) -> Record:
    cell = cells.get(str(run.settings.get("cell")), "")
    return {
        "run": run.id,
        "status": run.status,
        "what": cell or what(run),
        "cell": cell,
        "started": "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M}",
        "took": "" if math.isnan(run.seconds) else duration(run.seconds),
        "seconds": run.seconds,
        "shown": _result(run),
        "code": str(run.code),
        "remarks": "; ".join(_remarks(run)),
        "command": run.command,
        **{f"result_{key}": value for key, value in run.result.items() if is_number(value)},
    }


def what(run: Run) -> str:
    """Benchmark, method and seed of a training; the settings that are there of another run."""
    settings = run.settings
    named = ("tasks.name", "algorithm.name", "algorithm.variant")
    words = [str(settings[key]) for key in named if settings.get(key)]
    if not words:
        words = [f"{key}={value}" for key, value in list(settings.items())[:4] if key != "seed"]
    return " ".join(words) + ("" if settings.get("seed") is None else f", seed {run.seed}")


def _result(run: Run) -> str:
    for score, factor, digits, unit in (("accuracy", 100.0, 1, " %"), ("mse", 1.0, 3, " mse")):
        if run.result.get(f"test_{score}") is not None:
            mean = number(run.result_number(f"test_{score}"), factor, digits)
            half = number(run.result_number("test_half_width"), factor, digits)
            return mean + ("" if half == MISSING else f" ± {half}") + unit
    numbers = [f"{key} {value:.4g}" for key, value in run.result.items() if is_number(value)]
    return ", ".join(numbers[:3])


def _remarks(run: Run) -> list[str]:
    silent = _silence(run) if run.status == "RUNNING" else 0.0
    remarks = [
        f"goes on from run {run.resumes}" if run.resumes else "",
        f"went on as run {run.resumed_by}" if run.resumed_by else "",
        f"diverged {run.result['diverged']}" if run.result.get("diverged") else "",
        f"no sign of life for {duration(silent)}" if silent > SILENT else "",
        run.failure if not run.complete else "",
        f"not readable: {', '.join(run.faults)}" if run.faults else "",
    ]
    return [remark for remark in remarks if remark]


def _silence(run: Run) -> float:
    """Seconds since the run was last heard of."""
    last = run.last_sign or run.started
    return 0.0 if last is None else (datetime.now(timezone.utc) - last).total_seconds()
