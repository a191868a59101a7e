"""The runs of a database or of exported files: what can be read of each, and how they differ.

A field of another type than Sacred's costs that field: it is as good as not there, and `Run.faults`
says so in the list of runs. So nothing that a document holds can end a report.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from itertools import count, groupby
from typing import Any, NamedTuple, TypeVar

from experiments.sweeps.definition import PLACES, format_value
from experiments.tracking.records import Document, Records, RunId, Series

COMPLETED = "COMPLETED"
NO_SERIES = Series([], [])
PACKAGES = ("torch", "torchvision", "learn2learn", "higher", "numpy")
"""Those a run's numbers depend on."""

INCIDENTAL = ("seed", "cell", "resume", "checkpoint_seconds", *PLACES)
"""Settings that may differ between runs of one mean."""

MOST_PARTS = 6
"""Files and packages that a line about other code names."""

NAMES = {str: "text", dict: "an object", list: "a list", bool: "true or false", int: "a number",
         float: "a number"}  # fmt: skip
Kind = TypeVar("Kind", str, list, dict)


class CodeVersion(NamedTuple):
    """Which code a run was made by, as Sacred recorded it."""

    commit: str  # empty outside a repository
    dirty: bool  # whether files differed from the commit
    sources: Mapping[str, str]  # md5 by file
    packages: Mapping[str, str]  # versions of `PACKAGES`

    @property
    def signature(self) -> Hashable:
        """Equal for equal code. The commit counts only where no source file is recorded: another
        commit with the same files is the same code, and uncommitted changes are in the files."""
        files = tuple(sorted(self.sources.items())) or (self.commit, self.dirty)
        return files, tuple(self.packages.items())

    def __str__(self) -> str:
        """``a1b2c3d`` or ``a1b2c3d with uncommitted changes``."""
        return (self.commit[:7] or "no commit") + " with uncommitted changes" * self.dirty


class Run:
    """One run: its document, a plain one of `experiments.tracking.records`, and loaded metrics."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.metrics: dict[str, Series] = {}  # loaded by the archive, in the order recorded
        self.faults: list[str] = []  # what of its record could not be read
        self.id: RunId = document["_id"]
        self.status = self._get("status", str) or "UNKNOWN"
        self.experiment = self._get("experiment.name", str)
        self.started = self._time("start_time")  # all times are in UTC
        self.last_sign = self._time("stop_time") or self._time("heartbeat")
        self.settings = flatten(self._get("config", dict))  # with dotted names
        self.seed = setting_text(self.settings.get("seed"))
        result = document.get("result")
        result = self._get("info.result", dict) if result is None else result
        self.result: dict[str, Any] = result if isinstance(result, dict) else {"returned": result}
        self.code = self._code()
        self.host = self._get("host.hostname", str)
        self.failure = (self._items("fail_trace", str) or [""])[-1].strip()
        self.command = self._command()  # with tasks.root=DATA wherever the data lay
        self.resumes, self.resumed_by = (
            str(self._get("info", dict).get(name) or "") for name in ("resumes", "resumed_by")
        )
        self.complete = self.status == COMPLETED

    @property
    def seconds(self) -> float:
        """From its start to its end, or to its last sign of life; nan where that is unknown."""
        if self.started is None or self.last_sign is None:
            return math.nan
        return (self.last_sign - self.started).total_seconds()

    @cached_property
    def compared(self) -> dict[str, Any]:
        """The settings that must be equal within one mean; None counts as not set, as by code
        without the setting."""
        return {key: value for key, value in self.settings.items()
                if key not in INCIDENTAL and key[:1] != "_" and value is not None}  # fmt: skip

    @cached_property
    def settings_key(self) -> Hashable:
        """Equal for runs of equal settings."""
        return tuple(sorted((key, repr(value)) for key, value in self.compared.items()))

    def series(self, name: str) -> Series:
        """A loaded metric, empty if it has none."""
        return self.metrics.get(name, NO_SERIES)

    def number(self, path: str) -> float:
        """Such as that of ``result.iterations`` or ``config.budget``; nan where it has none."""
        group, _, name = path.partition(".")
        value: Any = (self.result if group == "result" else self.settings).get(name)
        if is_number(value):
            return float(value)
        if value is not None:
            self.fault(f"{path}: expected a number, got {_kind(value)}")
        return math.nan

    def counts(self, name: str) -> list[int]:
        """A list of whole numbers in its configuration, sorted; empty where it has none."""
        value = self.settings.get(name)
        items = value if isinstance(value, list) else [] if value is None else [math.inf]
        counts = {item for item in items if type(item) is int}
        if len(counts) < len(items):
            self.fault(f"config.{name}: expected whole numbers, got {setting_text(value)[:40]}")
        return sorted(counts)

    def fault(self, text: str) -> None:
        """Note what could not be read."""
        if text and text not in self.faults:
            self.faults.append(text)

    def _get(self, path: str, kind: type[Kind]) -> Kind:
        """A field of the type that it must have, or an empty one."""
        group, _, leaf = path.rpartition(".")
        value = (self._get(group, dict) if group else self._document).get(leaf)
        if isinstance(value, kind):
            return value
        if value is not None:
            self.fault(f"{path}: expected {NAMES[kind]}, got {_kind(value)}")
        return kind()

    def _items(self, path: str, kind: type[Kind]) -> list[Kind]:
        """Those of a list that are of the type."""
        items = self._get(path, list)
        right = [item for item in items if isinstance(item, kind)]
        if len(right) < len(items):
            self.fault(f"{path}: expected a list of {NAMES[kind]}, got others in it")
        return right

    def _time(self, path: str) -> datetime | None:
        text = self._get(path, str)
        try:
            return datetime.fromisoformat(text).astimezone(UTC) if text else None
        except (ValueError, OverflowError):
            self.fault(f"{path}: expected a time, got text")
            return None

    def _code(self) -> CodeVersion:
        repository = (self._items("experiment.repositories", dict) or [{}])[0]
        pairs = self._items("experiment.sources", list)
        right = [pair for pair in pairs if list(map(type, pair)) == [str, str]]
        if len(right) < len(pairs):
            self.fault("experiment.sources: expected pairs of a name and an md5")
        lines = self._items("experiment.dependencies", str)
        versions = dict(line.partition("==")[::2] for line in lines)
        packages = {name: versions[name] for name in PACKAGES if name in versions}
        commit = repository.get("commit")
        commit = commit if isinstance(commit, str) else ""
        return CodeVersion(commit, repository.get("dirty") is True, dict(right), packages)

    def _command(self) -> str:
        updates = flatten(self._get("meta.config_updates", dict))
        if updates.get("tasks.root"):
            updates["tasks.root"] = "DATA"
        words = [f"{key}={setting_text(value)}" for key, value in updates.items()
                 if key not in ("cell", "output")]  # fmt: skip
        words = [*self._items("meta.named_configs", str), *words]
        return command_of(self.experiment) + (f" with {shlex.join(words)}" if words else "")


class Archive:
    """What a database or files have.

    Attributes:
        runs: by number; those with other names come last.
        by_cell: the same, by the identity of the sweep's cell that they are.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self.runs = [Run(document) for document in records.runs]
        self.by_cell: dict[str, list[Run]] = {}
        for run in self.runs:
            self.by_cell.setdefault(str(run.settings.get("cell")), []).append(run)

    def load(self, runs: Iterable[Run], names: Sequence[str] | None = None) -> None:
        """Fetch these metrics of all these runs at once, or all their metrics."""
        by_id = {run.id: run for run in runs}
        for number, name, series, fault in self._records.metrics(by_id, names):
            by_id[number].metrics[name] = series
            by_id[number].fault(fault)

    def of_experiment(self, name: str) -> list[Run]:
        """The runs of one experiment."""
        return [run for run in self.runs if run.experiment == name]


def unequal(tables: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """What is not the same in all of these tables, with the values it takes."""
    tables = list(tables)
    values = {name: dict.fromkeys(setting_text(t[name]) if name in t else "not set" for t in tables)
              for name in sorted({name for table in tables for name in table})}  # fmt: skip
    return {name: list(found) for name, found in values.items() if len(found) > 1}


def difference_lines(label: str, runs: Sequence[Run]) -> list[str]:
    """A line for each way in which the runs of one mean differ, none if they do not."""
    by_code: dict[Hashable, list[Run]] = {}
    for run in runs:
        by_code.setdefault(run.code.signature, []).append(run)
    lines = [_code_line(label, list(by_code.values()))] if len(by_code) > 1 else []
    if settings := unequal(run.compared for run in runs):
        told = "; ".join(f"{name} = {' or '.join(values)}" for name, values in settings.items())
        lines.append(f"{label}: settings differ between its runs: {told}")
    hosts = sorted({run.host for run in runs})
    if len(hosts) > 1:
        lines.append(f"{label}: on {len(hosts)} machines ({', '.join(hosts)}); times may differ")
    return lines


def _code_line(label: str, groups: Sequence[Sequence[Run]]) -> str:
    """Who was run by which code, and the files and packages that differ."""
    versions = ", ".join(f"run{'s' * (len(same) > 1)} {run_list(run.id for run in same)}"
                         f" by {same[0].code}" for same in groups)  # fmt: skip
    codes = [same[0].code for same in groups]
    parts = [*unequal(c.sources for c in codes), *unequal(c.packages for c in codes)]
    parts = parts or ["the commit or its uncommitted changes (no source file is recorded)"]
    more = f" and {len(parts) - MOST_PARTS} more" if len(parts) > MOST_PARTS else ""
    return f"{label}: code differs: {versions}; in {', '.join(parts[:MOST_PARTS])}{more}"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"algorithm.lr": 0.1} from {"algorithm": {"lr": 0.1}}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(inner, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def setting_text(value: Any) -> str:
    """As it is given on the command line."""
    try:
        return format_value(value)
    except (TypeError, MemoryError, RecursionError):  # of Python's parser, on strange text
        return repr(value)


def is_number(value: Any) -> bool:
    """Whether it is one that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)


def _kind(value: Any) -> str:
    """What a value is, in words."""
    return NAMES.get(type(value), "nothing")


def run_list(ids: Iterable[RunId]) -> str:
    """``1-3, 7`` for runs 1, 2, 3 and 7; names as they are."""
    ids = set(ids)
    numbers, place = sorted(i for i in ids if isinstance(i, int)), count()
    spans = [list(span) for _, span in groupby(numbers, key=lambda n: n - next(place))]
    texts = [f"{s[0]}-{s[-1]}" if len(s) > 2 else ", ".join(map(str, s)) for s in spans]
    return ", ".join([*texts, *sorted(i for i in ids if isinstance(i, str))])


def command_of(experiment: str) -> str:
    """What runs an experiment: those of papers lie in a package of their own."""
    papers = experiment in ("memory", "hypergradient", "convergence")
    return f"python -m experiments.{'papers.' * papers}{shlex.quote(experiment)}"
