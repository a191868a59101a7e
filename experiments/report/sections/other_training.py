"""Trainings outside the sweeps shown: means over seeds, only of equal code and settings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from experiments.report.archive import Run
from experiments.report.content import (
    Column,
    Figure,
    Record,
    Section,
    Source,
    Table,
    file_name,
    number,
    plus_minus,
    text_column,
)
from experiments.report.differences import (
    compared_settings,
    group_key,
    run_list,
    unequal_settings,
)
from experiments.report.learning_curves import curve_caption, curve_records, draw_curves
from experiments.report.request import TRAIN, Request
from experiments.report.summary import Summary
from experiments.statistics import seeds_mean

MOST_LINES = 8
COMMAND = "python -m experiments.train with ..."
NOTE = (
    "A row is the mean over the seeds of runs of equal settings and equal code, of each seed the"
    " newest; runs of other settings or other code are another row. Setting: what is not the same"
    " in all rows of the benchmark. ±: 95 % over seeds (Student's t). ± within a run: the mean of"
    " the runs' own 95 % half widths over their test tasks."
)


def sections(request: Request) -> list[Section]:
    """A table and a figure for each benchmark; nothing without such runs."""
    in_sweeps = {run.id for state in request.sweeps for run in state.attempts}
    runs = [r for r in request.archive.of_experiment(TRAIN) if r.complete and r.id not in in_sweeps]
    by_benchmark: dict[str, list[Run]] = {}
    for run in runs:
        by_benchmark.setdefault(str(run.settings.get("tasks.name")), []).append(run)
    return [_section(name, own, request) for name, own in sorted(by_benchmark.items())]


def _section(benchmark: str, runs: Sequence[Run], request: Request) -> Section:
    groups = _groups(request.summaries(runs))
    varied = unequal_settings([compared_settings(of[0].run) for of in groups.values()])
    records = tuple(_record(of, list(varied)) for of in groups.values())
    table = Table(
        file_name("other", benchmark),
        f"Trainings on {benchmark} outside the sweeps above.",
        (
            text_column("method", "method"),
            text_column("setting", "setting"),
            text_column("code", "code"),
            Column("seeds", lambda r: f"{r['seeds']}"),
            Column("test score", _score),
            Column("± within a run", _value("half_width_tasks")),
            Column("best validation", _value("validation")),
            Column("outer iterations", lambda r: number(r["iterations"], 1, 0)),
            Column("collapsed", lambda r: f"{r['collapsed']} of {r['seeds']}"),
            text_column("runs", "runs"),
            text_column("command of the last", "command"),
        ),
        records,
        Source(COMMAND, tuple(run.id for run in runs)),
        (NOTE,),
    )
    figure = _figure(benchmark, list(groups.values()))
    items: tuple[Table | Figure, ...] = (table,) if figure is None else (table, figure)
    return Section(f"{benchmark}, other trainings", _of_other_sweeps(runs), items)


def _of_other_sweeps(runs: Sequence[Run]) -> tuple[str, ...]:
    ids = [run.id for run in runs if run.settings.get("cell")]
    if not ids:
        return ()
    return (
        f"Runs {run_list(ids)} are cells of a sweep with other settings than those shown; the"
        " report shows it with the name and the KEY=VALUE that it was run with.",
    )


def _groups(runs: Sequence[Summary]) -> dict[Hashable, list[Summary]]:
    """Runs of equal code and settings; of one seed the newest."""
    groups: dict[Hashable, dict[str, Summary]] = {}
    for run in runs:
        groups.setdefault(group_key(run.run), {})[repr(run.run.settings.get("seed"))] = run
    return {key: list(seeds.values()) for key, seeds in groups.items()}


def _record(runs: Sequence[Summary], varied: Sequence[str]) -> Record:
    first = runs[0].run
    test = seeds_mean([run.test for run in runs])
    settings = compared_settings(first)
    shown = [f"{key}={settings[key]}" for key in varied
             if key in settings and key not in ("algorithm.name", "algorithm.variant")]
    return {
        "method": _method(first),
        "setting": " ".join(shown),
        "code": str(first.code),
        "score": runs[0].score,
        "seeds": len(runs),
        "test_mean": test.mean,
        "test_half_width_seeds": test.half_width,
        "half_width_tasks": seeds_mean([run.test_half_width for run in runs]).mean,
        "validation": seeds_mean([run.best for run in runs]).mean,
        "iterations": seeds_mean([float(run.iterations or 0) for run in runs]).mean,
        "collapsed": sum(run.collapsed for run in runs),
        "runs": run_list(run.run.id for run in runs),
        "command": runs[-1].run.command,
    }


def _figure(benchmark: str, groups: Sequence[Sequence[Summary]]) -> Figure | None:
    long = [of for of in groups if all(len(run.points) > 1 for run in of)]
    newest = long[-MOST_LINES:]
    if not newest:
        return None
    curves = {f"{_method(of[0].run)}, {_label(of)}": of for of in newest}
    score = newest[0][0].score
    left_out = len(long) - len(newest)
    runs = tuple(run.run.id for of in newest for run in of)
    return Figure(
        file_name("curves_other", benchmark),
        f"{benchmark}. {curve_caption(curves, score)}",
        lambda: draw_curves(curves, score, None),
        curve_records(curves),
        Source(COMMAND, runs),
        (f"The newest {MOST_LINES} groups; {left_out} older ones are not drawn.",)
        if left_out else (),
    )


def _label(runs: Sequence[Summary]) -> str:
    ids = run_list(run.run.id for run in runs)
    return f"run {ids}" if len(runs) == 1 else f"runs {ids}"


def _method(run: Run) -> str:
    variant = run.settings.get("algorithm.variant")
    return f"{run.settings.get('algorithm.name')}" + (f" {variant}" if variant else "")


def _factor(record: Record) -> float:
    return 100.0 if record["score"] == "accuracy" else 1.0


def _digits(record: Record) -> int:
    return 1 if record["score"] == "accuracy" else 3


def _value(key: str) -> Callable[[Record], str]:
    return lambda record: number(record[key], _factor(record), _digits(record))


def _score(record: Record) -> str:
    text = plus_minus(
        record["test_mean"], record["test_half_width_seeds"], _factor(record), _digits(record)
    )
    return f"{text} %" if record["score"] == "accuracy" else f"{text} {record['score']}"
