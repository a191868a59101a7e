"""What runs left behind, as plain data: from a database, or from files that `export` wrote.

Nothing of it is trusted. Whatever a document or a line holds becomes text, numbers, lists and
objects (`plain`); text that a terminal would obey is spelled out; times are ISO text in UTC. A file
is gzip'ed JSON lines, a run a line: ``{"runs": document, "metrics": {NAME: {"steps": [...],
"values": [...]}}}``. It is read piece by piece, and refused before it becomes large in memory.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from bson import CodecOptions
from bson.codec_options import DatetimeConversion

from experiments.tracking.database import Documents
from experiments.tracking.errors import UserError

Document = dict[str, Any]
RunId = int | str

FIELDS = (
    "status", "start_time", "stop_time", "heartbeat", "result", "config", "fail_trace",
    "info", "experiment", "host.hostname", "meta.named_configs", "meta.config_updates",
)  # fmt: skip
"""Of a run's document; the printed output and the artifacts are left in the database."""

EVERY_STEP = r"^train/"
"""Metrics with a point at every outer iteration, as a pattern of their names."""

LENIENT: CodecOptions[Document] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
)
"""One document with a year beyond 9999 or text that is no UTF-8 does not end the reading of all."""

BATCH = 100
"""Runs a question asks for: the embedded server takes longer than in proportion to their number."""

DEPTH = 40
INT64 = 2**63
LINE_LIMIT, FILE_LIMIT = 4 * 2**20, 32 * 2**20
VALUES_LIMIT = 10**6
"""Bytes of one line and of all files together, unpacked, and values in them: one value can take
a hundred times the memory of its text."""


class Series(NamedTuple):
    """A metric: values at steps, both in the order in which they were recorded."""

    steps: list[int]
    values: list[float]


class Metric(NamedTuple):
    """A run's series, and what of it could not be read; empty: nothing."""

    run: RunId
    name: str
    series: Series
    fault: str


class DatabaseRecords:
    """The runs of a database.

    Args:
        documents: the pymongo database.
        question: a filter of ``runs``.
        label: where it is.

    Attributes:
        runs: plain documents by number; names after numbers.
    """

    def __init__(
        self, documents: Documents, question: Document | None = None, label: str = ""
    ) -> None:
        self.label = f"the database {label}"
        self._documents = documents.with_options(codec_options=LENIENT)
        self._ids: dict[RunId, Any] = {}
        self._md5 = self._read_md5()
        found = self._documents["runs"].find(question or {}, dict.fromkeys(FIELDS, 1))
        self.runs = sorted((self._run(document) for document in found), key=_order)

    def _read_md5(self) -> dict[str, str]:
        files = self._documents["fs.files"].find({"md5": {"$exists": True}}, {"md5": 1})
        return {str(file["_id"]): plain(file["md5"]) for file in files}

    def _run(self, document: Document) -> Document:
        number = _free(run_id(document["_id"]), self._ids)
        self._ids[number] = document["_id"]
        run = {**plain(document), "_id": number}
        sources = _at(run, "experiment", "sources")
        if isinstance(sources, list):
            run["experiment"]["sources"] = [self._source(source) for source in sources]
        if isinstance(run.get("info"), dict):
            run["info"].pop("metrics", None)  # a list of the metrics' numbers in this database
        return run

    def _source(self, source: Any) -> Any:
        """A file's name and md5, instead of its number in the database."""
        if isinstance(source, list) and len(source) == 2:
            return [source[0], self._md5.get(str(source[1]), str(source[1]))]
        return source

    def metrics(
        self, runs: Iterable[RunId], names: Sequence[str] | None = None, without: str = ""
    ) -> Iterator[Metric]:
        """Those of some runs: of these names, or all but those that fit a regular expression."""
        numbers = {_key(self._ids[run]): run for run in runs}
        raw = [self._ids[run] for run in numbers.values()]
        chosen: Document = {} if names is None else {"name": {"$in": list(names)}}
        if without:
            chosen = {"name": {"$not": {"$regex": without}}}
        fields = {"run_id": 1, "name": 1, "steps": 1, "values": 1}
        for first in range(0, len(raw), BATCH):
            of_some = {"run_id": {"$in": raw[first : first + BATCH]}, **chosen}
            found = self._documents["metrics"].find(of_some, fields)
            for metric in sorted(found, key=lambda metric: str(metric["_id"])):  # as recorded
                run, name = numbers.get(_key(metric.get("run_id"))), metric.get("name")
                if run is not None and isinstance(name, str):
                    yield _metric(run, printable(name), metric)


class FileRecords:
    """The runs of files that `export` wrote; a run that is in several counts once.

    Args:
        paths: of the files.

    Attributes:
        runs: plain documents by number; of two runs with one number the later one gets another.

    Raises:
        UserError: a file is none, is damaged, or would become large.
    """

    def __init__(self, paths: Iterable[Path | str]) -> None:
        files = [Path(path) for path in paths]
        self.label = ", ".join(path.name for path in files)
        self._metrics: dict[RunId, dict[str, Any]] = {}
        found: dict[RunId, Document] = {}
        seen: set[bytes] = set()
        budget = _Budget()
        for path in files:
            for document, metrics in _read(path, budget):
                content = json.dumps([document, metrics], sort_keys=True).encode()
                if (digest := hashlib.sha256(content).digest()) not in seen:
                    seen.add(digest)
                    number = _free(run_id(document.get("_id")), found)
                    found[number] = {**document, "_id": number}
                    self._metrics[number] = metrics
        self.runs = sorted(found.values(), key=_order)

    def metrics(
        self, runs: Iterable[RunId], names: Sequence[str] | None = None
    ) -> Iterator[Metric]:
        """Those of some runs: of these names, or all."""
        for run in runs:
            for name, metric in self._metrics[run].items():
                if names is None or name in names:
                    yield _metric(run, name, metric)


Records = DatabaseRecords | FileRecords


def write_records(path: Path, records: DatabaseRecords, without: str = EVERY_STEP) -> int:
    """Write the file; its size in bytes. The same records make the same file.

    Args:
        path: of the file.
        records: written with all their metrics,
        without: but for those whose names fit this regular expression; empty: none.
    """
    metrics: dict[RunId, dict[str, Any]] = {run["_id"]: {} for run in records.runs}
    for run, name, series, fault in records.metrics(list(metrics), without=without):
        if fault:
            raise UserError(f"run {run}: {fault}; mend the run's record, or export the others")
        metrics[run][name] = series._asdict()
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        for document in records.runs:
            entry = {"runs": document, "metrics": metrics[document["_id"]]}
            file.write(json.dumps(entry).encode() + b"\n")
    return path.stat().st_size


def plain(value: Any, depth: int = DEPTH) -> Any:
    """Text, numbers, true, false, none, and lists and objects of them, from whatever it is."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < INT64 else str(value)
    if isinstance(value, datetime):
        return value.replace(tzinfo=value.tzinfo or timezone.utc).isoformat()
    if depth and isinstance(value, Mapping):
        return {printable(str(key)): plain(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, (list, tuple)):
        return [plain(item, depth - 1) for item in value]
    return printable(value if type(value) is str else repr(value) if depth else "nested too deeply")


def printable(text: str) -> str:
    r"""The text with what no one should print spelled out: control characters as ``\x1b``.

    Example:
        >>> printable("a\x1b[31mb")
        'a\\x1b[31mb'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def run_id(value: Any) -> RunId:
    """How a run is called: its number, or text."""
    number = isinstance(value, int) and not isinstance(value, bool)
    return int(value) if number else printable(str(value))


def _key(value: Any) -> tuple[str, Any]:
    """Equal for what is one number or text to a database, and hashable."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number", value
    return ("text", str(value)) if isinstance(value, str) else ("other", repr(value))


def _free(number: RunId, taken: Mapping[RunId, Any]) -> RunId:
    """The number, or one that nothing else has."""
    if number not in taken:
        return number
    return next(name for n in range(2, len(taken) + 3) if (name := f"{number} ({n})") not in taken)


def _order(run: Document) -> tuple[bool, int, str]:
    number = run["_id"]
    return not isinstance(number, int), number if isinstance(number, int) else 0, str(number)


def _at(document: Any, *path: str) -> Any:
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _metric(run: RunId, name: str, metric: Any) -> Metric:
    steps, values = plain(_at(metric, "steps")), plain(_at(metric, "values"))
    if not isinstance(steps, list) or not isinstance(values, list):
        return Metric(run, name, Series([], []), f"{name}: steps or values are no list")
    pairs = [(_step(s), _value(v)) for s, v in zip(steps, values, strict=False)]
    right = [(s, v) for s, v in pairs if s is not None and v is not None]
    number = max(len(steps), len(values))
    wrong = number - len(right)
    fault = f"{name}: {wrong} of {number} points are no numbers at steps" if wrong else ""
    return Metric(run, name, Series([s for s, _ in right], [v for _, v in right]), fault)


def _step(value: Any) -> int | None:
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value % 1 == 0
    return int(value) if whole else None


def _value(value: Any) -> float | None:
    """None for what is no number; a number that is missing is nan."""
    if value is None:
        return math.nan
    try:
        wrong = isinstance(value, bool) or not isinstance(value, (int, float))
        return None if wrong else value if isinstance(value, float) else float(value) and value
    except OverflowError:
        return None


class _Budget:
    """What the files of one reading may still become."""

    def __init__(self) -> None:
        self._bytes, self._values = FILE_LIMIT, VALUES_LIMIT

    def spend(self, line: bytes, path: Path) -> None:
        """Count a line, before anything is made of it."""
        self._bytes -= len(line)
        self._values -= sum(map(line.count, (b"[", b"{", b",", b":")))
        if len(line) > LINE_LIMIT or self._bytes < 0 or self._values < 0:
            raise UserError(
                f"{path}: expected lines of at most {LINE_LIMIT >> 20} MiB, and at most"
                f" {FILE_LIMIT >> 20} MiB and {VALUES_LIMIT} values in all, got more; read fewer"
                " files, or export fewer runs into one"
            )


def _read(path: Path, budget: _Budget) -> Iterator[tuple[Document, dict[str, Any]]]:
    try:
        with gzip.open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), 1):
                budget.spend(line, path)
                entry = _plain_line(line)
                run, metrics = _at(entry, "runs"), _at(entry, "metrics")
                if not isinstance(run, dict):
                    raise UserError(
                        f"{path}, line {number}: expected a run as experiments.tracking.export"
                        " writes it, got something else"
                    )
                yield run, metrics if isinstance(metrics, dict) else {}
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: expected gzip'ed JSON lines, got a damaged file, or another kind; fetch it"
            " again"
        ) from None
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{path}: {why}; give a file of exported runs") from None


def _plain_line(line: bytes) -> Any:
    try:
        return plain(json.loads(line))
    except RecursionError:
        raise ValueError("nested too deeply") from None
