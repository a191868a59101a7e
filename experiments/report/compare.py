"""What differs between runs that are about to be averaged: never silently."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from experiments.report.runs import CodeVersion, Run, run_list, setting_text
from experiments.sweeps.definition import PLACES

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


def unequal_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, with the values they take."""
    tables = [compared_settings(run) for run in runs]
    names = sorted({name for table in tables for name in table})
    values = {name: [setting_text(t[name]) if name in t else "not set" for t in tables]
              for name in names}  # fmt: skip
    return {name: list(dict.fromkeys(v)) for name, v in values.items() if len(set(v)) > 1}


def difference_lines(label: str, runs: Sequence[Run]) -> list[str]:
    """A line for each way in which the runs of one mean differ, none if they do not."""
    lines = [_code_line(label, runs)] if len({run.code.signature for run in runs}) > 1 else []
    if unequal := unequal_settings(runs):
        told = "; ".join(f"{name} = {' or '.join(values)}" for name, values in unequal.items())
        lines.append(f"{label}: settings differ between its runs: {told}")
    hosts = sorted({run.host for run in runs})
    if len(hosts) > 1:
        lines.append(f"{label}: on {len(hosts)} machines ({', '.join(hosts)}); times may differ")
    return lines


def code_differences(versions: Iterable[CodeVersion]) -> list[str]:
    """The files and packages that are not the same in all of these versions."""
    versions = list(versions)
    files = _unequal([dict(version.sources) for version in versions])
    packages = _unequal([dict(version.packages) for version in versions])
    if not (files or packages) and len({v.signature for v in versions}) > 1:
        return ["the commit or its uncommitted changes (no source file is recorded)"]
    return [*files, *packages]


def _unequal(tables: Sequence[Mapping[str, str]]) -> list[str]:
    names = sorted({name for table in tables for name in table})
    return [name for name in names if len({table.get(name) for table in tables}) > 1]


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
