"""Experiments of which one run holds a whole figure: nothing is averaged over runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from experiments.report.archive import Archive, Run
from experiments.report.content import Figure, Section, Source, Table, text_column
from experiments.report.differences import difference_lines, run_list, settings_key
from experiments.report.request import Request

MOST = 4
"""Runs drawn of one experiment, each of other settings."""

MISSING_COLUMNS = (
    text_column("what", "what"),
    text_column("state", "state"),
    text_column("why", "why"),
    text_column("command", "command"),
)


class Shown(NamedTuple):
    """A run that is drawn.

    Attributes:
        suffix: of its files' names, empty for the first.
        notes: what it was run with, and which runs it stands for.
    """

    run: Run
    suffix: str
    notes: tuple[str, ...]

    @property
    def source(self) -> Source:
        """Of its tables and figures."""
        return Source(self.run.command, (self.run.id,))


Items = Callable[[Shown, Archive], list[Table | Figure]]


def by_run(request: Request, experiment: str, title: str, what: str, items: Items) -> list[Section]:
    """One section: tables and figures of each run shown, or the command that is missing.

    Args:
        request: what was asked.
        experiment: its name in the database.
        title: of the section.
        what: the figures and tables of the papers, where missing.
        items: makes a run's tables and figures.
    """
    runs = request.archive.of_experiment(experiment)
    found, text = _shown(experiment, [run for run in runs if run.complete])
    if not found:
        return [Section(title, (), (_missing(experiment, what, runs),))]
    made = [item for shown in found for item in items(shown, request.archive)]
    return [Section(title, text, tuple(made))]


def _shown(experiment: str, runs: list[Run]) -> tuple[list[Shown], tuple[str, ...]]:
    """Of runs of equal settings and seed the newest; the one of default settings first."""
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault((settings_key(run), repr(run.settings.get("seed"))), []).append(run)
    default = f"python -m experiments.{experiment}"
    order = sorted(groups.values(), key=lambda g: (g[-1].command == default, runs.index(g[-1])))
    order.reverse()
    found = [Shown(group[-1], f"_{n}" if n else "", _notes(group, n > 0))
             for n, group in enumerate(order[:MOST])]
    left = [run.id for group in order[MOST:] for run in group]
    text = (f"Not drawn: runs {run_list(left)}, of still other settings.",) if left else ()
    return found, text


def _notes(group: list[Run], other: bool) -> tuple[str, ...]:
    """Runs of one group, oldest first."""
    newest = group[-1]
    notes = [f"Other settings than above: {newest.command}"] if other else []
    if len(group) > 1:
        older = run_list(run.id for run in group[:-1])
        notes.append(
            f"Run {newest.id} is the newest of {len(group)} runs of equal settings and seed;"
            f" not drawn, and averaged with nothing: {older}."
        )
    return (*notes, *difference_lines("These runs", group))


def _missing(experiment: str, what: str, runs: list[Run]) -> Table:
    """What there is instead of a complete run."""
    command = f"python -m experiments.{experiment}"
    last = runs[-1] if runs else None
    why = "" if last is None else f"run {last.id} {last.status}: {last.failure or 'not complete'}"
    state = "not run" if last is None else last.status.lower()
    record = {"what": what, "state": state, "why": why, "command": command}
    return Table(
        f"missing_{experiment}", f"Missing: no complete run of experiments.{experiment}.",
        MISSING_COLUMNS, (record,), Source(command, tuple(run.id for run in runs)),
    )  # fmt: skip
