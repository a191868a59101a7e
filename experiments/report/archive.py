"""The runs of a database and their metrics, in Sacred's ordinary schema; read, never written."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from experiments.report.code_version import CodeVersion, read_code
from experiments.sweeps.cells import format_value
from experiments.tracking.database import Documents

COMPLETED = "COMPLETED"
FIELDS = (
    "status", "start_time", "stop_time", "heartbeat", "result", "config", "info.tasks",
    "info.result", "info.resumes", "info.resumed_by", "experiment.name", "experiment.sources",
    "experiment.repositories", "experiment.dependencies", "host.hostname", "fail_trace",
    "meta.named_configs", "meta.config_updates",
)  # fmt: skip

BATCH = 100
"""Runs a question asks for: the embedded server takes longer than in proportion to their number."""


class Series(NamedTuple):
    """A metric: values at steps, both in the order in which they were recorded."""

    steps: list[int]
    values: list[float]


NO_SERIES = Series([], [])


@dataclass(frozen=True)
class Run:
    """One run's document, without its metrics.

    Attributes:
        started: in UTC, as Sacred writes it.
        last_sign: its end, or the last heartbeat of a run without one.
        settings: the configuration with dotted names.
        result: what it returned, or had put into ``info.result``; empty if it has none.
        failure: the last line of its trace.
        command: what ran it, with tasks.root=DATA wherever the data lay.
    """

    id: Any
    status: str
    experiment: str
    started: datetime | None
    last_sign: datetime | None
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    info: Mapping[str, Any]
    code: CodeVersion
    host: str
    failure: str
    command: str

    @property
    def complete(self) -> bool:
        """Whether it ended by itself, without an error."""
        return self.status == COMPLETED


class Archive:
    """What the database has.

    Args:
        documents: the pymongo database.

    Attributes:
        runs: all of them, by their number; names after numbers.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        found = list(documents["runs"].find({}, dict.fromkeys(FIELDS, 1)))
        md5 = self._md5()
        self.runs = sorted((_read(document, md5) for document in found), key=_order)
        self._series: dict[tuple[Any, str], Series] = {}
        self._loaded: set[tuple[Any, str]] = set()
        self._collections: dict[str, list[dict[str, Any]]] = {}

    def _md5(self) -> dict[Any, str]:
        files = self._documents["fs.files"].find({"md5": {"$exists": True}}, {"md5": 1})
        return {file["_id"]: file["md5"] for file in files}

    def load(self, runs: Iterable[Run], names: Iterable[str]) -> None:
        """Fetch these metrics of all these runs, for `series`: `BATCH` runs a question, not one."""
        names = list(names)
        ids = [run.id for run in runs if any((run.id, n) not in self._loaded for n in names)]
        if not ids:
            return
        fields = {"run_id": 1, "name": 1, "steps": 1, "values": 1}
        for first in range(0, len(ids), BATCH):
            some = {"$in": ids[first : first + BATCH]}
            wanted = {"run_id": some, "name": {"$in": names}}
            for metric in self._documents["metrics"].find(wanted, fields):
                series = Series(metric["steps"], metric["values"])
                self._series[metric["run_id"], metric["name"]] = series
        self._loaded |= {(run_id, name) for run_id in ids for name in names}

    def series(self, run: Run, name: str) -> Series:
        """A metric of a run, empty if it has none."""
        self.load([run], [name])
        return self._series.get((run.id, name), NO_SERIES)

    def all_series(self, run: Run) -> dict[str, Series]:
        """Every metric of a run by its name, as first recorded; for runs of which all is shown."""
        fields = {"name": 1, "steps": 1, "values": 1}
        found = self._documents["metrics"].find({"run_id": run.id}, fields)
        series = {m["name"]: Series(m["steps"], m["values"]) for m in found}
        document = self._documents["runs"].find_one({"_id": run.id}, {"info.metrics": 1}) or {}
        order = [m.get("name") for m in (document.get("info") or {}).get("metrics") or ()]
        names = [*(name for name in order if name in series), *sorted(series)]
        return {name: series[name] for name in dict.fromkeys(names)}

    def collection(self, name: str) -> list[dict[str, Any]]:
        """The documents of another, small collection."""
        if name not in self._collections:
            self._collections[name] = list(self._documents[name].find())
        return self._collections[name]

    def of_experiment(self, name: str) -> list[Run]:
        """The runs of one experiment."""
        return [run for run in self.runs if run.experiment == name]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"algorithm.lr": 0.1} from {"algorithm": {"lr": 0.1}}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _read(document: Mapping[str, Any], md5: Mapping[Any, str]) -> Run:
    experiment = {"sources": [], **(document.get("experiment") or {})}
    info, result = document.get("info") or {}, document.get("result")
    trace = document.get("fail_trace") or [""]
    return Run(
        id=document["_id"],
        status=document.get("status") or "UNKNOWN",
        experiment=experiment.get("name") or "",
        started=document.get("start_time"),
        last_sign=document.get("stop_time") or document.get("heartbeat"),
        settings=flatten(document.get("config") or {}),
        result=result if isinstance(result, Mapping) else info.get("result") or {},
        info=info,
        code=read_code(experiment, md5),
        host=(document.get("host") or {}).get("hostname") or "",
        failure=trace[-1].strip(),
        command=_command(experiment.get("name") or "", document.get("meta") or {}),
    )


def _command(experiment: str, meta: Mapping[str, Any]) -> str:
    updates = {**flatten(meta.get("config_updates") or {})}
    if updates.get("tasks.root"):
        updates["tasks.root"] = "DATA"
    kept = {key: value for key, value in updates.items() if key not in ("cell", "output")}
    words = [f"{key}={format_value(value)}" for key, value in kept.items()]
    words = [*(meta.get("named_configs") or ()), *words]
    with_ = ["with"] if words else []
    return shlex.join(["python", "-m", f"experiments.{experiment}", *with_, *words])


def _order(run: Run) -> tuple[bool, int, str]:
    number = run.id if isinstance(run.id, int) else 0
    return not isinstance(run.id, int), number, str(run.id)
