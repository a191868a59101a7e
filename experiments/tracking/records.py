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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from bson import CodecOptions
from bson.codec_options import DatetimeConversion

from experiments.tracking.config import once_each
from experiments.tracking.database import Documents
from experiments.tracking.errors import UserError, wrong
from experiments.tracking.values import INT64, printable

Document = dict[str, Any]
RunId = int | str

# Of a run's document; the printed output and the artifacts are left in the database.
FIELDS = (
    "status", "start_time", "stop_time", "heartbeat", "result", "config", "fail_trace",
    "info", "experiment", "host.hostname", "meta.named_configs", "meta.config_updates",
)  # fmt: skip
# One document with a year beyond 9999 or text that is no UTF-8 does not end the reading of all.
LENIENT: CodecOptions[Document] = CodecOptions(
    datetime_conversion=DatetimeConversion.DATETIME_AUTO, unicode_decode_error_handler="replace"
)
# Runs a question asks for: the embedded server takes longer than in proportion to their number.
BATCH = 100
DEPTH = 40
# Bytes of one line and of all files together, unpacked, and values in them: one value can take a
# hundred times the memory of its text.
LINE_LIMIT, FILE_LIMIT, VALUES_LIMIT = 4 * 2**20, 32 * 2**20, 10**6


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
    """The runs of a pymongo database that fit a filter; `label` says where it is.

    `runs` are plain documents by number; names after numbers.
    """

    def __init__(
        self, documents: Documents, question: Document | None = None, label: str = ""
    ) -> None:
        self.label = f"the database {label}"
        self._documents = documents.with_options(codec_options=LENIENT)
        self._ids: dict[RunId, Any] = {}
        files = self._documents["fs.files"].find({"md5": {"$exists": True}}, {"md5": 1})
        md5 = {str(plain(file.get("_id"))): plain(file.get("md5")) for file in files}
        found = self._documents["runs"].find(question or {}, dict.fromkeys(FIELDS, 1))
        self.runs = sorted((self._run(document, md5) for document in found), key=_order)

    def _run(self, document: Document, md5: Mapping[str, Any]) -> Document:
        number = _free(document.get("_id"), self._ids)
        self._ids[number] = document.get("_id")
        run = {**plain(document), "_id": number}
        if isinstance(sources := group(run, "experiment").get("sources"), list):
            sources[:] = [  # a file's md5 instead of its number in the database
                [source[0], md5.get(str(source[1]), str(source[1]))]
                if isinstance(source, list) and len(source) == 2 else source
                for source in sources
            ]  # fmt: skip
        group(run, "info").pop("metrics", None)  # a list of their numbers in this database
        return run

    def metrics(
        self, runs: Iterable[RunId], names: Sequence[str] | None = None, without: str = ""
    ) -> Iterator[Metric]:
        """Those of some runs: of these names, or all but those that fit a regular expression."""
        raw = [self._ids[run] for run in runs]
        numbers = {_key(self._ids[run]): run for run in self._ids}
        chosen: Document = {} if names is None else {"name": {"$in": list(names)}}
        if without:
            chosen = {"name": {"$not": {"$regex": without}}}
        fields = {"run_id": 1, "name": 1, "steps": 1, "values": 1}
        for first in range(0, len(raw), BATCH):
            of_some = {"run_id": {"$in": raw[first : first + BATCH]}, **chosen}
            found = self._documents["metrics"].find(of_some, fields)
            for metric in sorted(found, key=lambda metric: str(metric.get("_id"))):  # as recorded
                run, name = numbers.get(_key(metric.get("run_id"))), metric.get("name")
                if run is not None and isinstance(name, str):
                    yield _metric(run, printable(name), metric)


class FileRecords:
    """The runs of files that `export` wrote; a run that is in several counts once.

    `runs` are plain documents by number; of two with one number the later one gets another.
    UserError: a file is none, is damaged, or would become large.
    """

    def __init__(self, paths: Iterable[Path | str]) -> None:
        files = [Path(path) for path in paths]
        self.label = ", ".join(path.name for path in files)
        self._metrics: dict[RunId, Any] = {}
        self.runs: list[Document] = []
        seen: set[bytes] = set()
        for entry in _read(files):
            digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                number, metrics = _free(entry["runs"].get("_id"), self._metrics), entry["metrics"]
                self.runs.append({**entry["runs"], "_id": number})
                self._metrics[number] = metrics if isinstance(metrics, dict) else {}
        self.runs.sort(key=_order)

    def metrics(
        self, runs: Iterable[RunId], names: Sequence[str] | None = None
    ) -> Iterator[Metric]:
        """Those of some runs: of these names, or all."""
        for run in runs:
            for name, metric in self._metrics[run].items():
                if names is None or name in names:
                    yield _metric(run, name, metric)


Records = DatabaseRecords | FileRecords


def plain(value: Any, depth: int = DEPTH) -> Any:
    """Text, numbers, true, false, none, and lists and objects of them, from whatever it is."""
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < INT64 else str(value)
    if isinstance(value, datetime):
        return value.replace(tzinfo=value.tzinfo or UTC).isoformat()
    if depth and isinstance(value, Mapping):
        return {printable(str(key)): plain(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, (list, tuple)):
        return [plain(item, depth - 1) for item in value]
    return printable(value if type(value) is str else repr(value) if depth else "nested too deeply")


def group(document: Document, name: str) -> Document:
    """The part of a plain document with this name; an empty one where that is none."""
    found = document.get(name)
    return found if isinstance(found, dict) else {}


def is_number(value: Any) -> bool:
    """Whether it is one, of plain data."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _key(value: Any) -> Any:
    """Equal for what is one number or text to a database, and hashable."""
    return value if is_number(value) else f"{type(value).__name__} {value!r}"


def _free(identity: Any, taken: Mapping[RunId, Any]) -> RunId:
    """How a run is called: its number, or text; or with a number behind it, if that is taken."""
    whole = isinstance(identity, int) and not isinstance(identity, bool)
    name: RunId = int(identity) if whole else printable(str(identity))
    others = (f"{name} ({n})" for n in range(2, len(taken) + 3))
    return name if name not in taken else next(other for other in others if other not in taken)


def _order(run: Document) -> tuple[bool, RunId]:
    return isinstance(run["_id"], str), run["_id"]


def _metric(run: RunId, name: str, metric: Any) -> Metric:
    metric = plain(metric) if isinstance(metric, Mapping) else {}
    steps, values = metric.get("steps"), metric.get("values")
    if not isinstance(steps, list) or not isinstance(values, list):
        return Metric(run, name, Series([], []), f"{name}: steps or values are no list")
    pairs = [(step, math.nan if value is None else value)  # a number that is missing is nan
             for step, value in zip(steps, values, strict=False)]  # fmt: skip
    right = [(int(s), v) for s, v in pairs if is_number(s) and s % 1 == 0 and is_number(v)]
    number = max(len(steps), len(values))
    lost = number - len(right)
    fault = f"{name}: {lost} of {number} points are no numbers at steps" if lost else ""
    return Metric(run, name, Series([s for s, _ in right], [v for _, v in right]), fault)


def _entry(line: bytes) -> Any:
    """None: no JSON, or a name stands twice in it."""
    try:
        return plain(json.loads(line, object_pairs_hook=once_each))
    except (ValueError, RecursionError):
        return None


def _read(paths: Iterable[Path]) -> Iterator[Document]:
    """The lines of the files, all together within the limits."""
    size = values = 0
    for path in paths:
        before = size
        try:
            if path.is_fifo():
                raise OSError("a FIFO, which would be waited for")
            with gzip.open(path, "rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(LINE_LIMIT + 1), b""), 1):
                    size += len(line)  # counted before anything is made of it
                    values += sum(map(line.count, (b"[", b"{", b",", b":")))
                    if max(len(line) / LINE_LIMIT, size / FILE_LIMIT, values / VALUES_LIMIT) > 1:
                        limits = (f"lines of at most {LINE_LIMIT >> 20} MiB, and at most"
                                  f" {FILE_LIMIT >> 20} MiB and {VALUES_LIMIT} values in all")
                        raise wrong(str(path), limits, "more",
                                    "read fewer files, or export fewer runs into one")
                    entry = _entry(line)
                    if not isinstance(entry, dict) or not isinstance(entry.get("runs"), dict):
                        raise wrong(f"{path}, line {number}",
                                    "a run as experiments.tracking.export writes it",
                                    "something else", "export it again")
                    yield {"metrics": {}, **entry}
            if size == before:
                raise EOFError
        except UserError:
            raise
        except (gzip.BadGzipFile, EOFError, zlib.error, ValueError):
            raise wrong(str(path), "gzip'ed JSON lines", "a damaged file, or another kind",
                        "fetch it again") from None
        except OSError as error:
            why = error.strerror or error
            raise UserError(f"{path}: {why}; give a file of exported runs") from None
