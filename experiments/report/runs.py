"""The runs of a database or of exported files, each with what can be read of it.

A field of another type than Sacred's costs that field: it is as good as not there, and `Run.faults`
says so in the list of runs. So nothing that a document holds can end a report.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeVar

from experiments.sweeps.definition import format_value
from experiments.tracking.records import Document, Records, RunId, Series

COMPLETED = "COMPLETED"
NO_SERIES = Series([], [])
PACKAGES = ("torch", "torchvision", "learn2learn", "higher", "numpy")
"""Those a run's numbers depend on."""

NAMES = {str: "text", dict: "an object", list: "a list", bool: "true or false", int: "a number",
         float: "a number"}  # fmt: skip
Kind = TypeVar("Kind", str, list, dict)
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CodeVersion:
    """Which code a run was made by, as Sacred recorded it.

    Attributes:
        commit: empty outside a repository.
        dirty: whether files differed from the commit.
        sources: (file, md5) pairs, sorted.
        packages: (name, version) pairs of `PACKAGES`.
    """

    commit: str
    dirty: bool
    sources: Pairs
    packages: Pairs

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for equal code. The commit counts only where no source file is recorded: another
        commit with the same files is the same code, and uncommitted changes are in the files."""
        code: tuple[Any, ...] = self.sources or (self.commit, self.dirty)
        return (code, self.packages)

    def __str__(self) -> str:
        """``a1b2c3d`` or ``a1b2c3d with uncommitted changes``."""
        commit = self.commit[:7] or "no commit"
        return f"{commit} with uncommitted changes" if self.dirty else commit


@dataclass(frozen=True)
class Run:
    """One run's document, without its metrics.

    Attributes:
        started: in UTC.
        last_sign: its end, or the last heartbeat of a run without one.
        settings: the configuration with dotted names.
        result: what it returned, or had put into ``info.result``; empty if it has none.
        failure: the last line of its trace.
        command: what ran it, with tasks.root=DATA wherever the data lay.
        resumes, resumed_by: the run that it went on from, and that went on from it.
        faults: what of its record could not be read.
    """

    id: RunId
    status: str
    experiment: str
    started: datetime | None
    last_sign: datetime | None
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    code: CodeVersion
    host: str
    failure: str
    command: str
    resumes: str
    resumed_by: str
    faults: list[str] = field(default_factory=list, compare=False)

    @property
    def complete(self) -> bool:
        """Whether it ended by itself, without an error."""
        return self.status == COMPLETED

    @property
    def seed(self) -> str:
        """As text: equal for equal seeds."""
        return setting_text(self.settings.get("seed"))

    @property
    def seconds(self) -> float:
        """From its start to its end, or to its last sign of life; nan where that is unknown."""
        if self.started is None or self.last_sign is None:
            return math.nan
        return (self.last_sign - self.started).total_seconds()

    def result_number(self, name: str) -> float:
        """A number of its result; nan where it has none."""
        return self._number(f"result.{name}", self.result.get(name))

    def setting_number(self, name: str) -> float:
        """A number of its configuration; nan where it has none."""
        return self._number(f"config.{name}", self.settings.get(name))

    def setting_counts(self, name: str) -> list[int]:
        """A list of whole numbers in its configuration, sorted; empty where it has none."""
        value = self.settings.get(name)
        items = value if isinstance(value, list) else [] if value is None else [math.inf]
        counts = {item for item in items if type(item) is int}
        if len(counts) < len(items):
            self.fault(f"config.{name}: expected whole numbers, got {setting_text(value)[:40]}")
        return sorted(counts)

    def _number(self, name: str, value: Any) -> float:
        if value is None:
            return math.nan
        if is_number(value):
            return float(value)
        self.fault(f"{name}: expected a number, got {kind_of(value)}")
        return math.nan

    def fault(self, text: str) -> None:
        """Note what could not be read."""
        if text and text not in self.faults:
            self.faults.append(text)


class Archive:
    """What a database or files have.

    Args:
        records: of `experiments.tracking.records`.

    Attributes:
        runs: all of them, by their number; names after numbers.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self.runs = [read_run(document) for document in records.runs]
        self._by_id = {run.id: run for run in self.runs}
        self._series: dict[tuple[RunId, str], Series] = {}
        self._loaded: set[tuple[RunId, str]] = set()

    def load(self, runs: Iterable[Run], names: Sequence[str]) -> None:
        """Fetch these metrics of all these runs, for `series`."""
        new = [r.id for r in runs if any((r.id, name) not in self._loaded for name in names)]
        for metric in self._records.metrics(new, names):
            self._series[metric.run, metric.name] = metric.series
            self._by_id[metric.run].fault(metric.fault)
        self._loaded |= {(number, name) for number in new for name in names}

    def series(self, run: Run, name: str) -> Series:
        """A metric of a run, empty if it has none."""
        self.load([run], [name])
        return self._series.get((run.id, name), NO_SERIES)

    def all_series(self, run: Run) -> dict[str, Series]:
        """Every metric of a run by its name, as first recorded; for runs of which all is shown."""
        found = list(self._records.metrics([run.id]))
        for metric in found:
            run.fault(metric.fault)
        return {metric.name: metric.series for metric in found}

    def of_experiment(self, name: str) -> list[Run]:
        """The runs of one experiment."""
        return [run for run in self.runs if run.experiment == name]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"algorithm.lr": 0.1} from {"algorithm": {"lr": 0.1}}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def setting_text(value: Any) -> str:
    """As it is given on the command line."""
    try:
        return format_value(value)
    except (TypeError, MemoryError, RecursionError):  # of Python's parser, on strange text
        return repr(value)


def is_number(value: Any) -> bool:
    """Whether it is one that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < 2**1023


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    return NAMES.get(type(value), "nothing")


def run_list(ids: Iterable[RunId]) -> str:
    """``1-3, 7`` for runs 1, 2, 3 and 7; names as they are."""
    ids = list(dict.fromkeys(ids))
    numbers = sorted(i for i in ids if isinstance(i, int))
    names = sorted(i for i in ids if isinstance(i, str))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    texts = [f"{s[0]}-{s[-1]}" if len(s) > 2 else ", ".join(map(str, s)) for s in spans]
    return ", ".join([*texts, *names])


class _Reader:
    """Fields of a document, each of the type it must have or empty."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self.faults: list[str] = []

    def get(self, path: str, kind: type[Kind]) -> Kind:
        place: Any = self._document
        for name in path.split("."):
            if not isinstance(place, dict):
                return kind()  # told by who asks for the object itself
            place = place.get(name)
        if place is None or isinstance(place, kind):
            return kind() if place is None else place
        self.fault(path, NAMES[kind], place)
        return kind()

    def items(self, path: str, kind: type[Kind]) -> list[Kind]:
        """Those of a list that are of the type."""
        found = self.get(path, list)
        for item in found:
            if not isinstance(item, kind):
                self.fault(path, f"a list of {NAMES[kind]}", item)
        return [item for item in found if isinstance(item, kind)]

    def time(self, path: str) -> datetime | None:
        text = self.get(path, str)
        try:
            return datetime.fromisoformat(text).astimezone(timezone.utc) if text else None
        except (ValueError, OverflowError):
            self.fault(path, "a time", text)
            return None

    def fault(self, path: str, wanted: str, value: Any) -> None:
        text = f"{path}: expected {wanted}, got {kind_of(value)}"
        if text not in self.faults:
            self.faults.append(text)


def read_run(document: Document) -> Run:
    """What can be read of a run's document, a plain one of `experiments.tracking.records`."""
    read = _Reader(document)
    for path in ("experiment", "host", "info", "meta"):
        read.get(path, dict)
    experiment = read.get("experiment.name", str)
    result = document.get("result")
    if result is None:
        result = read.get("info.result", dict)
    return Run(
        id=document["_id"],
        status=read.get("status", str) or "UNKNOWN",
        experiment=experiment,
        started=read.time("start_time"),
        last_sign=read.time("stop_time") or read.time("heartbeat"),
        settings=flatten(read.get("config", dict)),
        result=result if isinstance(result, dict) else {"returned": result},
        code=_code(read),
        host=read.get("host.hostname", str),
        failure=(read.items("fail_trace", str) or [""])[-1].strip(),
        command=_command(experiment, read),
        resumes=_pointer(document, "resumes"),
        resumed_by=_pointer(document, "resumed_by"),
        faults=read.faults,
    )


def _pointer(document: Document, name: str) -> str:
    info = document.get("info")
    value = info.get(name) if isinstance(info, dict) else None
    return "" if value is None else str(value)


def _code(read: _Reader) -> CodeVersion:
    repository = (read.items("experiment.repositories", dict) or [{}])[0]
    pairs = read.items("experiment.sources", list)
    sources = [(pair[0], pair[1]) for pair in pairs if list(map(type, pair)) == [str, str]]
    if len(sources) < len(pairs):
        read.faults.append("experiment.sources: expected pairs of a name and an md5")
    lines = read.items("experiment.dependencies", str)
    versions = dict(line.partition("==")[::2] for line in lines)
    packages = tuple((name, versions[name]) for name in PACKAGES if name in versions)
    commit = repository.get("commit")
    return CodeVersion(
        commit if isinstance(commit, str) else "", repository.get("dirty") is True,
        tuple(sorted(sources)), packages,
    )  # fmt: skip


def command_of(experiment: str) -> str:
    """What runs an experiment: those of papers lie in a package of their own."""
    papers = experiment in ("memory", "hypergradient", "convergence")
    return f"python -m experiments.{'papers.' * papers}{shlex.quote(experiment)}"


def _command(experiment: str, read: _Reader) -> str:
    updates = flatten(read.get("meta.config_updates", dict))
    if updates.get("tasks.root"):
        updates["tasks.root"] = "DATA"
    kept = {key: value for key, value in updates.items() if key not in ("cell", "output")}
    words = [f"{key}={setting_text(value)}" for key, value in kept.items()]
    words = [*read.items("meta.named_configs", str), *words]
    return " ".join([command_of(experiment), *(["with", shlex.join(words)] if words else [])])
