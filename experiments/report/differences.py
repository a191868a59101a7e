"""What differs between runs that are about to be averaged: never silently."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from experiments.report.archive import Run
from experiments.report.code_version import code_differences
from experiments.sweeps.cells import PLACES, format_value

INCIDENTAL = ("seed", "cell", "resume", "checkpoint_seconds", *PLACES)
"""Settings that may differ between runs of one mean."""

SHOWN = 6


def compared_settings(run: Run) -> dict[str, Any]:
    """What must be equal within one mean; None counts as not set, as code without the setting."""
    return {
        key: value
        for key, value in run.settings.items()
        if key not in INCIDENTAL and not key.startswith("_") and value is not None
    }


def settings_key(run: Run) -> Hashable:
    """Equal for runs of equal settings."""
    return tuple(sorted((key, repr(value)) for key, value in compared_settings(run).items()))


def group_key(run: Run) -> Hashable:
    """Equal for runs of one experiment with equal settings and equal code."""
    return run.experiment, settings_key(run), run.code.signature


def unequal_settings(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings that are not the same in all tables, with the values they take."""
    names = sorted({name for table in tables for name in table})
    values = {name: [_shown(table, name) for table in tables] for name in names}
    return {name: list(dict.fromkeys(v)) for name, v in values.items() if len(set(v)) > 1}


def difference_lines(label: str, runs: Sequence[Run]) -> list[str]:
    """A line for each way in which the runs of one mean differ, none if they do not."""
    lines = [_code_line(label, runs)] if len({run.code.signature for run in runs}) > 1 else []
    unequal = unequal_settings([compared_settings(run) for run in runs])
    if unequal:
        told = "; ".join(f"{name} = {' or '.join(values)}" for name, values in unequal.items())
        lines.append(f"{label}: settings differ between its runs: {told}")
    hosts = sorted({run.host for run in runs})
    if len(hosts) > 1:
        lines.append(f"{label}: on {len(hosts)} machines ({', '.join(hosts)}); times may differ")
    return lines


def run_list(ids: Iterable[Any]) -> str:
    """``1-3, 7`` for runs 1, 2, 3 and 7; names as they are."""
    ids = list(dict.fromkeys(ids))
    numbers = sorted(i for i in ids if isinstance(i, int))
    names = sorted(str(i) for i in ids if not isinstance(i, int))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    texts = [f"{s[0]}-{s[-1]}" if len(s) > 2 else ", ".join(map(str, s)) for s in spans]
    return ", ".join([*texts, *names])


def _code_line(label: str, runs: Sequence[Run]) -> str:
    by_code: dict[Hashable, list[Run]] = {}
    for run in runs:
        by_code.setdefault(run.code.signature, []).append(run)
    versions = [
        f"{'runs' if len(same) > 1 else 'run'} {run_list(run.id for run in same)} by {same[0].code}"
        for same in by_code.values()
    ]
    parts = code_differences([same[0].code for same in by_code.values()])
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return f"{label}: code differs: {', '.join(versions)}; in {', '.join(parts[:SHOWN])}{more}"


def _shown(table: Mapping[str, Any], name: str) -> str:
    return format_value(table[name]) if name in table else "not set"
