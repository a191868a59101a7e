"""A run of a database or of exported files: what can be read of it.

A field of another type than Sacred's costs that field: it is as good as not there, and `Run.faults`
says so in the list of runs. So nothing that a document holds can end a report or a sweep.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Hashable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from sacred.utils import iterate_flattened

from experiments.sweeps import definition
from experiments.sweeps.definition import PLACES, format_value
from experiments.tracking.records import Document, RunId, Series, is_number

COMPLETED = "COMPLETED"
NO_SERIES = Series([], [])
VALIDATION = "validation/accuracy"
LONG_AGO = datetime.min.replace(tzinfo=UTC)
PACKAGES = ("torch", "torchvision", "learn2learn", "higher", "numpy")
"""Those a run's numbers depend on."""

INCIDENTAL = ("seed", "cell", "resume", "checkpoint_seconds", *PLACES)
"""Settings that may differ between runs of one mean."""

DATA = ("classes", "samples", "notes")  # how many; which files
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
        self.settings = dict(iterate_flattened(self._get("config", dict)))  # with dotted names
        self.seed = format_value(self.settings.get("seed"))
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
        self.changed = False  # whether its code is not that here, where a sweep has compared them

    @property
    def seconds(self) -> float:
        """From its start to its end, or to its last sign of life; nan where that is unknown."""
        if self.started is None or self.last_sign is None:
            return math.nan
        return (self.last_sign - self.started).total_seconds()

    @property
    def state(self) -> str:
        """That of a cell whose newest run this is; a death from outside is no failure."""
        if self.status == "FAILED" and not self.failure.startswith("killed:"):
            return definition.FAILED
        known = {"RUNNING": definition.RUNNING, COMPLETED: definition.COMPLETED}
        return known.get(self.status, definition.INTERRUPTED)

    @property
    def last_validation(self) -> float:
        """What a grid is decided by; minus infinity without one, or for a diverged run."""
        last = float((self.series(VALIDATION).values or [math.nan])[-1])
        return last if math.isfinite(last) and not self.result.get("diverged") else -math.inf

    @cached_property
    def compared(self) -> dict[str, Any]:
        """The settings, and the data as found, that must be equal within one mean; None counts as
        not set, as by code without the setting."""
        found = self._get("info.tasks", dict)
        data = iterate_flattened({f"data.{key}": found.get(key) for key in DATA})
        return {key: value for key, value in [*self.settings.items(), *data]
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
            self.fault(f"config.{name}: expected whole numbers, got {format_value(value)[:40]}")
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
        updates = dict(iterate_flattened(self._get("meta.config_updates", dict)))
        if updates.get("tasks.root"):
            updates["tasks.root"] = "DATA"
        words = [f"{key}={format_value(value)}" for key, value in updates.items()
                 if key not in ("cell", "output")]  # fmt: skip
        words = [*self._items("meta.named_configs", str), *words]
        return command_of(self.experiment) + (f" with {shlex.join(words)}" if words else "")


def newest(runs: Iterable[Run]) -> Run | None:
    """The complete one that ended last."""
    done = [run for run in runs if run.complete]
    return max(done, key=lambda run: run.last_sign or LONG_AGO, default=None)


def _kind(value: Any) -> str:
    """What a value is, in words."""
    return NAMES.get(type(value), "nothing")


def command_of(experiment: str) -> str:
    """What runs an experiment: those of papers lie in a package of their own."""
    papers = experiment in ("memory", "hypergradient", "convergence")
    return f"python -m experiments.{'papers.' * papers}{shlex.quote(experiment)}"
