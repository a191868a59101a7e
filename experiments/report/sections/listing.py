"""Every run of every experiment, complete or not."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from experiments.report.archive import Run
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
)
from experiments.report.request import Request
from experiments.sweeps.listing import duration

SILENT = 600.0
"""Seconds without a heartbeat after which a running run may have been killed."""

FOLDED_FROM = 40


def sections(request: Request) -> list[Section]:
    """One table an experiment, newest run first."""
    names = {cell.cell.identity: f"{state.name} {state.benchmark} {cell.name}"
             for state in request.sweeps for cell in state.cells if cell.cell is not None}
    experiments = sorted({run.experiment for run in request.archive.runs})
    tables = tuple(_table(e, request.archive.of_experiment(e), names) for e in experiments)
    return [Section("All runs", (), tables)] if tables else []


def _table(experiment: str, runs: list[Run], cells: dict[str, str]) -> Table:
    columns = (
        text_column("run", "run"),
        text_column("status", "status"),
        text_column("what", "what"),
        text_column("started (UTC)", "started"),
        text_column("took", "took"),
        text_column("result", "shown"),
        text_column("code", "code"),
        text_column("remarks", "remarks"),
        Column("command", lambda r: "" if r["cell"] else r["command"], text=True),
    )
    return Table(
        file_name("runs", experiment or "unnamed"),
        f"Runs of {experiment or 'an experiment without a name'}, the newest first.",
        columns,
        tuple(_record(run, cells) for run in reversed(runs)),
        Source(f"python -m experiments.{experiment}", tuple(run.id for run in runs)),
        folded=len(runs) >= FOLDED_FROM,
    )


def _record(run: Run, cells: dict[str, str]) -> Record:
    started = "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M}"
    seconds, cell = _seconds(run), cells.get(str(run.settings.get("cell")), "")
    return {
        "run": run.id,
        "status": run.status,
        "what": cell or what(run),
        "cell": cell,
        "started": started,
        "took": "" if seconds is None else duration(seconds),
        "seconds": seconds,
        "shown": _result(run),
        "code": str(run.code),
        "remarks": "; ".join(_remarks(run)),
        "command": run.command,
        **{f"result_{key}": value for key, value in run.result.items() if _plain(value)},
    }


def what(run: Run) -> str:
    """Benchmark, method and seed of a training; the settings that are there of another run."""
    settings = run.settings
    named = [settings.get("tasks.name"), settings.get("algorithm.name"),
             settings.get("algorithm.variant")]
    words = [str(word) for word in named if word]
    if not words:
        words = [f"{key}={value}" for key, value in list(settings.items())[:4] if key != "seed"]
    seed = settings.get("seed")
    return " ".join(words) + ("" if seed is None else f", seed {seed}")


def _result(run: Run) -> str:
    for score, factor in (("accuracy", 100.0), ("mse", 1.0)):
        if run.result.get(f"test_{score}") is not None:
            mean = number(run.result[f"test_{score}"], factor, 1 if factor > 1 else 3)
            half = number(run.result.get("test_half_width"), factor, 1 if factor > 1 else 3)
            unit = " %" if factor > 1 else f" {score}"
            return mean + ("" if half == MISSING else f" ± {half}") + unit
    numbers = [f"{key} {value:.4g}" for key, value in run.result.items() if _plain(value)]
    return ", ".join(numbers[:3])


def _remarks(run: Run) -> list[str]:
    remarks = []
    if (before := run.info.get("resumes")) is not None:
        remarks.append(f"goes on from run {before}")
    if (after := run.info.get("resumed_by")) is not None:
        remarks.append(f"went on as run {after}")
    if run.result.get("diverged"):
        remarks.append(f"diverged {run.result['diverged']}")
    if run.status == "RUNNING" and (silent := _silence(run)) > SILENT:
        remarks.append(f"no sign of life for {duration(silent)}")
    if run.failure and not run.complete:
        remarks.append(run.failure)
    return remarks


def _seconds(run: Run) -> float | None:
    if run.started is None or run.last_sign is None:
        return None
    return (run.last_sign - run.started).total_seconds()


def _silence(run: Run) -> float:
    """Seconds since the run was last heard of."""
    last = run.last_sign or run.started
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    return 0.0 if last is None else (now - last.replace(tzinfo=None)).total_seconds()


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
