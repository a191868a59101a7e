"""How many runs there are and which sweeps they fill; trainings outside the sweeps, averaged only
over equal code and settings; every run, complete or not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from datetime import UTC, datetime

from experiments.report import content
from experiments.report.content import Column, Record, Section, Source, Table
from experiments.report.summary import SCORES, Request, Summary, mean_record, run_list, unequal
from experiments.sweeps.definition import COMPLETED, FAILED, INTERRUPTED, RUNNING, format_value
from experiments.sweeps.listing import duration
from experiments.sweeps.runs import Run, command_of
from experiments.tracking.records import is_number

SILENT = 600.0
"""Seconds without a heartbeat after which a running run may have been killed."""

FOLDED_FROM = 40

NOTE = (
    "A row is the mean over the seeds of runs of equal settings and equal code, of each seed the"
    " newest; runs of other settings or other code are another row. Setting: what is not the same"
    " in all rows of the benchmark. ±: 95 % over seeds (Student's t). ± within a run: the mean of"
    " the runs' own 95 % half widths over their test tasks."
)


def overview(request: Request) -> list[Section]:
    """Always there, also for an empty database."""
    runs = request.archive.runs
    counts = Counter(run.status for run in runs)
    told = ", ".join(f"{number} {status}" for status, number in counts.most_common())
    text = f"{len(runs)} runs: {told}." if runs else "There are no runs yet."
    return [Section("Overview", [text], [_sweeps(request)] if request.sweeps else [])]


def _sweeps(request: Request) -> Table:
    records = []
    for state in request.sweeps:
        counts = Counter(cell.state for cell in state.cells)
        records.append({
            "sweep": state.name, "benchmark": state.benchmark,
            "completed": f"{counts[COMPLETED]} of {len(state.cells)}",
            **{name: counts[name] or "" for name in (RUNNING, INTERRUPTED, FAILED)},
            "command": state.command(),
        })  # fmt: skip
    runs = [run.id for state in request.sweeps for run in state.attempts]
    return Table(
        "sweeps", "The sweeps, and how many of their cells there are.",
        content.texts("sweep", "benchmark", "completed", RUNNING, INTERRUPTED, FAILED,
                      command="command that fills it"),
        records, Source("python -m experiments.sweep SWEEP benchmark=NAME", runs),
    )  # fmt: skip


# Trainings outside the sweeps


def trainings(request: Request) -> list[Section]:
    """A table for each benchmark; nothing without such runs."""
    in_sweeps = {run.id for state in request.sweeps if not state.regression
                 for run in state.attempts}  # fmt: skip
    by_benchmark: dict[str, list[Summary]] = {}
    for run in request.archive.of_experiment("train"):
        if run.complete and run.id not in in_sweeps:
            benchmark = str(run.settings.get("tasks.name"))
            by_benchmark.setdefault(benchmark, []).append(Summary(run))
    return [_benchmark(name, own) for name, own in sorted(by_benchmark.items())]


def _benchmark(benchmark: str, runs: Sequence[Summary]) -> Section:
    by_kind: dict[Hashable, dict[str, Summary]] = {}
    for run in runs:  # of one seed the newest
        kind = (run.run.settings_key, run.run.code.signature)
        by_kind.setdefault(kind, {})[run.run.seed] = run
    groups = [list(seeds.values()) for seeds in by_kind.values()]
    varied = list(unequal(of[0].run.compared for of in groups))
    records = [_mean_record(of, varied) for of in groups]
    heads = (
        *content.texts("method", "setting", "code"),
        Column("seeds", lambda r: f"{r['seeds']}"),
        Column("test score", lambda r: _score(r["score"], r["test_mean"], r["test_half_width"])),
        Column("± within a run", lambda r: _scaled(r["score"], r["within_run_mean"])),
        Column("best validation", lambda r: _scaled(r["score"], r["validation_mean"])),
        content.number("outer iterations", "iterations_mean", digits=0),
        Column("collapsed", lambda r: f"{r['collapsed']} of {r['seeds']}"),
        *content.texts("runs", command="command of the last"),
    )
    table = Table(
        content.file_name("other", benchmark), f"Trainings on {benchmark} outside of sweeps.",
        heads, records,
        Source("python -m experiments.train with ...", [run.run.id for run in runs]),
        [NOTE, *content.fewer_lines(records, "test", "validation")],
    )  # fmt: skip
    cells = [run.run.id for run in runs if run.run.settings.get("cell")]
    text = (
        f"Runs {run_list(cells)} are cells of a sweep: of regressions, or with other settings than"
        " those shown; the report shows that with the name and the KEY=VALUE that it was run with."
    )
    return Section(f"{benchmark}, trainings", [text] if cells else [], [table])


def _mean_record(runs: Sequence[Summary], varied: Sequence[str]) -> Record:
    first = runs[0].run
    shown = [f"{key}={format_value(first.compared[key])}" for key in varied
             if key in first.compared and key not in ("algorithm.name", "algorithm.variant")]
    return {"method": _method(first), "setting": " ".join(shown), "code": str(first.code),
            "score": runs[0].score, **mean_record(runs),
            "command": runs[-1].run.command}  # fmt: skip


def _method(run: Run) -> str:
    variant = run.settings.get("algorithm.variant")
    return f"{run.settings.get('algorithm.name')}" + (f" {variant}" if variant else "")


def _scaled(score: str, value: float, half_width: float = math.nan) -> str:
    """Accuracies in per cent."""
    scale = (100.0, 1) if score == "accuracy" else (1.0, 3)
    return content.plus_minus(value, half_width, *scale)


def _score(score: str, value: float, half_width: float) -> str:
    unit = "%" if score == "accuracy" else score
    return f"{_scaled(score, value, half_width)} {unit}"


# Every run


def all_runs(request: Request) -> list[Section]:
    """One table an experiment, newest run first."""
    cells = {status.cell.identity: f"{state.name} {state.benchmark} {status.name}"
             for state in request.sweeps for status in state.cells if status.cell}  # fmt: skip
    heads = (
        *content.texts("run", "status", "what", started="started (UTC)", took="took",
                       shown="result", code="code", remarks="remarks"),
        Column("command", lambda r: "" if r["cell"] else r["command"], text=True),
    )  # fmt: skip
    tables = []
    for experiment in sorted({run.experiment for run in request.archive.runs}):
        runs = request.archive.of_experiment(experiment)
        tables.append(Table(
            content.file_name("runs", experiment or "unnamed"),
            f"Runs of {experiment or 'an experiment without a name'}, the newest first.",
            heads, [_record(run, cells) for run in reversed(runs)],
            Source(command_of(experiment), [run.id for run in runs]),
            folded=len(runs) >= FOLDED_FROM,
        ))  # fmt: skip
    return [Section("All runs", (), tables)] if tables else []


def _record(run: Run, cells: dict[str, str]) -> Record:
    cell = cells.get(str(run.settings.get("cell")), "")
    return {
        "run": run.id,
        "status": run.status,
        "what": cell or _what(run),
        "cell": cell,
        "started": "" if run.started is None else f"{run.started:%Y-%m-%d %H:%M}",
        "took": "" if math.isnan(run.seconds) else duration(run.seconds),
        "seconds": run.seconds,
        "shown": _result(run),
        "code": str(run.code),
        "remarks": "; ".join(filter(None, _remarks(run))),
        "command": run.command,
        **{f"result_{key}": value for key, value in run.result.items() if is_number(value)},
    }


def _what(run: Run) -> str:
    """Benchmark, method and seed of a training; the settings that are there of another run."""
    settings = run.settings
    named = ("tasks.name", "algorithm.name", "algorithm.variant")
    words = [str(settings[key]) for key in named if settings.get(key)]
    if not words:
        words = [f"{key}={value}" for key, value in list(settings.items())[:4] if key != "seed"]
    return " ".join(words) + ("" if settings.get("seed") is None else f", seed {run.seed}")


def _result(run: Run) -> str:
    for score in SCORES:
        if run.result.get(f"test_{score}") is not None:
            mean, half = run.number(f"result.test_{score}"), run.number("result.test_half_width")
            return _score(score, mean, half)
    numbers = [f"{key} {value:.4g}" for key, value in run.result.items() if is_number(value)]
    return ", ".join(numbers[:3])


def _remarks(run: Run) -> Iterator[str]:
    """What to know of it, and empty texts."""
    yield f"goes on from run {run.resumes}" if run.resumes else ""
    yield f"went on as run {run.resumed_by}" if run.resumed_by else ""
    yield f"diverged {run.result['diverged']}" if run.result.get("diverged") else ""
    heard = run.last_sign or run.started
    if run.status == "RUNNING" and heard is not None:
        silent = (datetime.now(UTC) - heard).total_seconds()
        yield f"no sign of life for {duration(silent)}" if silent > SILENT else ""
    yield run.failure if not run.complete else ""
    yield f"not readable: {', '.join(run.faults)}" if run.faults else ""
