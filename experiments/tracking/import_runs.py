"""Load runs that `experiments.tracking.export` wrote into a database.

    python -m experiments.tracking.import_runs docs/records/*.jsonl.gz

The database is the one a run would use; `-m HOST:PORT:DB` names another. A run keeps its number
where that is free, and what refers to it follows. A run that the database has already, by an
earlier import or because it was recorded there, is left as it is: importing twice changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gridfs
from bson import ObjectId
from pymongo.errors import DuplicateKeyError, PyMongoError

from experiments.tracking.database import Database, Documents, choose
from experiments.tracking.errors import UserError
from experiments.tracking.records import Document, Records, files_of, identity, read_records
from experiments.tracking.uploader import index_metrics, next_run_id

ORIGIN = "imported_from"
INTERRUPTED = "the import of this run was interrupted: run it again"


class Imported(NamedTuple):
    """How many runs were new, how many the database had."""

    new: int
    present: int


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after an error that is one line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tracking.import_runs", description=
                                     "Load exported runs into a database.")  # fmt: skip
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("-m", "--mongo_db", metavar="HOST:PORT:DB")
    options = parser.parse_args(argv)
    try:
        read = [(path, read_records(path)) for path in options.files]
        database = Database(choose(options.mongo_db))
        try:
            for path, records in read:
                done = import_records(records, database.documents, path.name)
                print(f"{path}: {done.new} runs imported, {done.present} were in {database.label}")
        finally:
            database.close()
    except (UserError, PyMongoError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


def import_records(records: Records, documents: Documents, name: str) -> Imported:
    """Merge checked records into a database; may be repeated, also after it was interrupted.

    Args:
        records: of `read_records`.
        documents: the pymongo database.
        name: of the file, recorded as ``info.imported_from.file``.
    """
    index_metrics(documents)
    return _Import(records, documents, name).run()


class _Import:
    def __init__(self, records: Records, documents: Documents, name: str) -> None:
        self._records, self._documents, self._name = records, documents, name
        self._numbers: dict[Any, Any] = {}
        self._files: dict[ObjectId, ObjectId] = {}

    def run(self) -> Imported:
        """All numbers first, since runs refer to each other; a run's own document last."""
        new = [run for run in self._records["runs"] if self._claim(run)]
        self._put_files({number for run in new for number in files_of(run)})
        metrics: dict[Any, list[Document]] = {}
        for metric in self._records["metrics"]:
            metrics.setdefault(metric["run_id"], []).append(metric)
        for run in new:
            ids = self._put_metrics(self._numbers[run["_id"]], metrics.get(run["_id"], []))
            self._put_run(run, ids)
        self._put_sweeps()
        return Imported(len(new), len(self._records["runs"]) - len(new))

    def _claim(self, run: Document) -> bool:
        """Find the run's number here, or take one; false if the whole run is here."""
        runs, wanted = self._documents["runs"], identity(run)
        for there in runs.find({"start_time": run["start_time"]}):
            if identity(there) == wanted:
                self._numbers[run["_id"]] = there["_id"]
                return _is_placeholder(there)
        keys = ("start_time", "host", "config", "meta", "experiment", "format")
        placeholder = {key: run[key] for key in keys if key in run}
        placeholder |= {"status": "FAILED", "fail_trace": [INTERRUPTED], "artifacts": [],
                        "info": {ORIGIN: {**self._origin(run), "complete": False}}}  # fmt: skip
        number = run["_id"]
        while True:
            try:
                runs.insert_one({**placeholder, "_id": number})
                break
            except DuplicateKeyError:
                number = next_run_id(runs)
        self._numbers[run["_id"]] = number
        return True

    def _origin(self, run: Document) -> Document:
        return {"file": self._name, "run": run["_id"]}

    def _put_files(self, wanted: set[ObjectId]) -> None:
        store, known = gridfs.GridFS(self._documents), self._documents["fs.files"]
        for file in self._records["fs.files"]:
            if file["_id"] not in wanted:
                continue
            number, content = file["_id"], file["data"]
            there = known.find_one({"_id": number}, {"md5": 1, "length": 1})
            same = there is not None and (there.get("md5"), there.get("length")) == (
                file.get("md5"), len(content)
            )  # fmt: skip
            if there is not None and not same:
                number = ObjectId()
            self._files[file["_id"]] = number
            if not same:
                store.delete(number)  # what an interrupted import has left
                store.put(content, _id=number, **self._entry(file))

    def _entry(self, file: Document) -> Document:
        """What ``fs.files`` says of a file; an artifact's name has its run's number."""
        kept = ("filename", "md5", "metadata", "contentType")
        entry: Document = {key: file[key] for key in kept if key in file}
        parts = entry["filename"].split("/", 4)
        if parts[:3] == ["artifact:", "", "runs"] and len(parts) == 5:
            parts[3] = str(self._pointer(parts[3]))
            entry["filename"] = "/".join(parts)
        return entry

    def _put_metrics(self, number: Any, metrics: list[Document]) -> dict[str, str]:
        """Insert a new run's metrics; their new numbers by the old ones, as text."""
        collection = self._documents["metrics"]
        collection.delete_many({"run_id": number})  # what an interrupted import has left
        ids = [metric["_id"] for metric in metrics]
        taken = {found["_id"] for found in collection.find({"_id": {"$in": ids}}, {"_id": 1})}
        new = {old: ObjectId() if old in taken else old for old in ids}
        if metrics:
            collection.insert_many([{**m, "_id": new[m["_id"]], "run_id": number} for m in metrics])
        return {str(old): str(now) for old, now in new.items()}

    def _put_run(self, run: Document, metric_ids: Mapping[str, str]) -> None:
        info = {**run["info"], ORIGIN: self._origin(run)}
        info.pop("metrics", None)
        listed = run["info"].get("metrics")
        if isinstance(listed, list):
            info["metrics"] = [{**m, "id": metric_ids.get(str(m.get("id")), m.get("id"))}
                               for m in listed if isinstance(m, dict)]  # fmt: skip
        for pointer in ("resumes", "resumed_by"):
            if info.get(pointer) is not None:
                info[pointer] = self._pointer(info[pointer])
        experiment = {**run["experiment"]}
        if "sources" in experiment:
            experiment["sources"] = [[n, self._files[f]] for n, f in experiment["sources"]]
        artifacts = [{**a, "file_id": self._files[a["file_id"]]} for a in run["artifacts"]]
        number = self._numbers[run["_id"]]
        whole = {**run, "_id": number, "info": info, "experiment": experiment,
                 "artifacts": artifacts}  # fmt: skip
        self._documents["runs"].replace_one({"_id": number}, whole)

    def _pointer(self, value: Any) -> Any:
        """Another run's new number; of a run that is not in the file, words that are no number."""
        for old, new in self._numbers.items():
            if str(old) == str(value):
                return str(new) if isinstance(value, str) else new
        return f"{value}, which was not exported"

    def _put_sweeps(self) -> None:
        for cell in self._records["sweep_cells"]:
            kept = {key: value for key, value in cell.items() if key != "_id"}
            self._documents["sweep_cells"].update_one(
                {"_id": cell["_id"]}, {"$setOnInsert": {**kept, "token": None}}, upsert=True
            )
        for choice in self._records["sweep_choices"]:
            runs = [None if run is None else self._numbers[run] for run in choice["runs"]]
            moved = {**choice, "runs": runs}
            moved["_id"] = choice_id(choice["cells"], runs)
            key = {"_id": moved.pop("_id")}
            self._documents["sweep_choices"].update_one(key, {"$setOnInsert": moved}, upsert=True)


def choice_id(identities: list[str], run_ids: list[Any]) -> str:
    """What a choice is found by: the grid's cells and the runs it was made from."""
    return hashlib.sha256(repr([identities, run_ids]).encode()).hexdigest()[:16]


def _is_placeholder(run: Mapping[str, Any]) -> bool:
    origin = (run.get("info") or {}).get(ORIGIN)
    return isinstance(origin, Mapping) and origin.get("complete") is False


if __name__ == "__main__":
    sys.exit(main())
