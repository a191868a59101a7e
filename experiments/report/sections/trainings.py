"""Trainings outside the sweeps shown: means over seeds, only of equal code and settings."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from experiments.report.compare import compared_settings, group_key, unequal_settings
from experiments.report.content import (
    Column,
    Figure,
    Record,
    Section,
    Source,
    Table,
    file_name,
    number,
    number_column,
    plus_minus,
    text_column,
    texts,
)
from experiments.report.figures import curve_caption, curve_records, draw_curves
from experiments.report.runs import Run, run_list, setting_text
from experiments.report.summary import Request, Summary
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
    trainings = request.archive.of_experiment("train")
    runs = [run for run in trainings if run.complete and run.id not in in_sweeps]
    by_benchmark: dict[str, list[Summary]] = {}
    for summary in request.summaries(runs):
        by_benchmark.setdefault(str(summary.run.settings.get("tasks.name")), []).append(summary)
    return [_section(name, own) for name, own in sorted(by_benchmark.items())]


def _section(benchmark: str, runs: Sequence[Summary]) -> Section:
    groups = _groups(runs)
    varied = list(unequal_settings([of[0].run for of in groups]))
    source = Source(COMMAND, tuple(run.run.id for run in runs))
    columns = (
        *texts("method", "setting", "code"),
        Column("seeds", lambda r: f"{r['seeds']}"),
        Column("test score", _score),
        Column("± within a run", lambda r: _scaled(r, "half_width_tasks")),
        Column("best validation", lambda r: _scaled(r, "validation")),
        number_column("outer iterations", "iterations", digits=0),
        Column("collapsed", lambda r: f"{r['collapsed']} of {r['seeds']}"),
        text_column("runs", "runs"),
        text_column("command of the last", "command"),
    )
    table = Table(
        file_name("other", benchmark), f"Trainings on {benchmark} outside the sweeps above.",
        columns, tuple(_record(of, varied) for of in groups), source, (NOTE,),
    )  # fmt: skip
    figure = _figure(benchmark, groups)
    cells = [run.run.id for run in runs if run.run.settings.get("cell")]
    text = (
        f"Runs {run_list(cells)} are cells of a sweep with other settings than those shown; the"
        " report shows it with the name and the KEY=VALUE that it was run with."
    )
    items = (table,) if figure is None else (table, figure)
    return Section(f"{benchmark}, other trainings", (text,) if cells else (), items)


def _groups(runs: Sequence[Summary]) -> list[list[Summary]]:
    """Runs of equal code and settings; of one seed the newest."""
    groups: dict[Hashable, dict[str, Summary]] = {}
    for run in runs:
        groups.setdefault(group_key(run.run), {})[run.run.seed] = run
    return [list(seeds.values()) for seeds in groups.values()]


def _record(runs: Sequence[Summary], varied: Sequence[str]) -> Record:
    first = runs[0].run
    test = seeds_mean([run.test for run in runs])
    settings = compared_settings(first)
    shown = [f"{key}={setting_text(settings[key])}" for key in varied
             if key in settings and key not in ("algorithm.name", "algorithm.variant")]  # fmt: skip
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
        "iterations": seeds_mean([run.iterations for run in runs]).mean,
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
    note = f"The newest {MOST_LINES} groups; {left_out} older ones are not drawn."
    return Figure(
        file_name("curves_other", benchmark),
        f"{benchmark}. {curve_caption(curves, score)}",
        lambda: draw_curves(curves, score, math.nan), curve_records(curves),
        Source(COMMAND, tuple(run.run.id for of in newest for run in of)),
        (note,) if left_out else (),
    )  # fmt: skip


def _label(runs: Sequence[Summary]) -> str:
    ids = run_list(run.run.id for run in runs)
    return f"run {ids}" if len(runs) == 1 else f"runs {ids}"


def _method(run: Run) -> str:
    variant = run.settings.get("algorithm.variant")
    return f"{run.settings.get('algorithm.name')}" + (f" {variant}" if variant else "")


def _scale(record: Record) -> tuple[float, int]:
    """Factor and digits: accuracies in per cent."""
    return (100.0, 1) if record["score"] == "accuracy" else (1.0, 3)


def _scaled(record: Record, key: str) -> str:
    return number(record[key], *_scale(record))


def _score(record: Record) -> str:
    text = plus_minus(record["test_mean"], record["test_half_width_seeds"], *_scale(record))
    return f"{text} %" if record["score"] == "accuracy" else f"{text} {record['score']}"
