"""Write finished runs to a file that outlives their database.

    python -m experiments.tracking.export docs/records/memory.jsonl.gz 3 7-9
    python -m experiments.tracking.export FILE experiment.name=memory status=COMPLETED
    python -m experiments.tracking.export FILE --sweep accuracy benchmark=caltech101

Words are numbers of runs and KEY=VALUE for fields of their documents; without any, all runs that
have ended. The file holds the runs' documents, source files and metrics, and what the sweeps have
claimed and chosen. Names of folders are replaced, the printed output is cut to its end. Left out
are artifacts (`--artifacts` keeps them) and the metrics of every step (`--without` names them).
`python -m experiments.tracking.import_runs` is the way back.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gridfs
from gridfs.errors import GridFSError
from pymongo.errors import PyMongoError

from experiments.sweeps.cells import parse_settings
from experiments.sweeps.plan import find_sweep, make_plan
from experiments.tracking.database import Database, Documents, choose
from experiments.tracking.errors import UserError
from experiments.tracking.places import Places
from experiments.tracking.records import ENDED, FIELDS, Document, Records, write_records

EVERY_STEP = "train/*"
OUTPUT_KEPT = 2000
"""Characters of the printed output, from its end."""

LEFT_OUT = "left_out"
"""The entry of a run's info that names what its file does not have."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after an error that is one line."""
    options = _parse(argv)
    try:
        database = Database(choose(options.mongo_db))
        try:
            question = _question(options.words, options.sweep)
            records = collect(database.documents, question, options.artifacts, options.without)
        finally:
            database.close()
        if not records["runs"]:
            raise UserError("no run that has ended fits; nothing is written")
        size = write_records(options.file, records)
    except (UserError, PyMongoError, GridFSError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    metrics = len(records["metrics"])
    print(f"{len(records['runs'])} runs, {metrics} metrics, {size / 1024:.0f} KiB: {options.file}")
    return 0


def collect(
    documents: Documents, question: Document, artifacts: bool = False, without: str = EVERY_STEP
) -> Records:
    """The runs that have ended and fit, with all that belongs to them.

    Args:
        documents: the pymongo database.
        question: a filter of ``runs``.
        artifacts: whether files that the runs have made are kept.
        without: metrics whose name fits this pattern are left out; empty: none.
    """
    found = documents["runs"].find({"$and": [question, {"status": {"$in": list(ENDED)}}]})
    records, files = Records(), _Files(documents)
    for run in found.sort("_id", 1):
        places = Places(run)
        metrics, left_out = _metrics(documents, run["_id"], without)
        short = _shortened(run, left_out, artifacts, places)
        records["runs"].append(files.named_once(short, places))
        records["metrics"].extend(metrics)
    records["fs.files"].extend(files.found.values())
    _add_sweeps(documents, question, records)
    return records


def _metrics(documents: Documents, run_id: Any, without: str) -> tuple[list[Document], list[str]]:
    """The metrics that are kept, and the names of the others."""
    named = list(documents["metrics"].find({"run_id": run_id}, {"name": 1}))
    out = [m for m in named if without and fnmatch.fnmatchcase(m["name"], without)]
    wanted = {"run_id": run_id, "_id": {"$nin": [m["_id"] for m in out]}}
    kept = [_only("metrics", m) for m in documents["metrics"].find(wanted).sort("_id", 1)]
    return kept, sorted(m["name"] for m in out)


def _shortened(
    run: Mapping[str, Any], metrics: Sequence[str], artifacts: bool, places: Places
) -> Document:
    """The run's document without what is left out, which it names."""
    short = {"artifacts": [], "meta": {}, "info": {}, "host": {}, **_only("runs", run)}
    output = short.get("captured_out") or ""
    left_out: Document = {}
    if metrics:
        left_out["metrics"] = list(metrics)
    if short["artifacts"] and not artifacts:
        left_out["artifacts"] = [artifact["name"] for artifact in short["artifacts"]]
        short["artifacts"] = []
    if len(output) > OUTPUT_KEPT:
        left_out["characters_of_output"] = len(output) - OUTPUT_KEPT
        short["captured_out"] = output[-OUTPUT_KEPT:]
    info = dict(short["info"] or {})
    if "metrics" in info:
        info["metrics"] = [m for m in info["metrics"] if m["name"] not in metrics]
    short["info"] = {**info, **({LEFT_OUT: left_out} if left_out else {})}
    return places.hidden(short)


def _only(collection: str, document: Mapping[str, Any]) -> Document:
    """The fields of a record; a viewer may have added its own."""
    return {key: value for key, value in document.items() if key in FIELDS[collection]}


class _Files:
    """Files of the runs; equal source files, which several processes have stored, once.

    Attributes:
        found: with their contents, by name and md5.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._store = gridfs.GridFS(documents)
        self._keys: dict[Any, tuple[str, Any]] = {}
        self.found: dict[tuple[str, Any], Document] = {}

    def named_once(self, run: Document, places: Places) -> Document:
        """The run's document with the numbers of the files that are kept."""
        experiment = dict(run["experiment"])
        if "sources" in experiment:
            experiment["sources"] = [[n, self._kept(f, places)] for n, f in experiment["sources"]]
        artifacts = [{**a, "file_id": self._kept(a["file_id"], places)} for a in run["artifacts"]]
        return {**run, "experiment": experiment, "artifacts": artifacts}

    def _kept(self, number: Any, places: Places) -> Any:
        if number not in self._keys:
            entry = self._documents["fs.files"].find_one({"_id": number}) or {}
            kept = {key: entry[key] for key in ("filename", "md5", "metadata", "contentType")
                    if entry.get(key) is not None}  # fmt: skip
            file = {"_id": number, **places.hidden(kept)}
            key = self._keys[number] = file["filename"], file.get("md5", number)
            if key not in self.found:
                self.found[key] = {**file, "data": self._store.get(number).read()}
        return self.found[self._keys[number]]["_id"]


def _add_sweeps(documents: Documents, question: Document, records: Records) -> None:
    """The cells of these runs (of all, with all runs), and the choices made from these runs."""
    runs = {run["_id"] for run in records["runs"]}
    cells = {str((run.get("config") or {}).get("cell")) for run in records["runs"]}
    wanted = {"_id": {"$in": sorted(cells)}} if question else {}
    free = {"state": {"$in": ["free", "failed"]}}
    for cell in documents["sweep_cells"].find({"$and": [wanted, free]}).sort("_id", 1):
        records["sweep_cells"].append({**_only("sweep_cells", cell), "token": None})
    for choice in documents["sweep_choices"].find().sort("_id", 1):
        if all(run is None or run in runs for run in choice["runs"]):
            records["sweep_choices"].append(_only("sweep_choices", choice))


def _question(words: Iterable[str], sweep: Sequence[str] | None) -> Document:
    words = list(words)
    parts: list[Document] = []
    numbers = [number for word in words if "=" not in word for number in _numbers(word)]
    if numbers:
        parts.append({"_id": {"$in": numbers}})
    settings = parse_settings([word for word in words if "=" in word])
    parts += [{key: {"$eq": value}} for key, value in settings.items()]
    if sweep:
        parts.append({"config.cell": {"$in": _cells(sweep)}})
    return {"$and": parts} if parts else {}


def _numbers(word: str) -> list[int | str]:
    span = re.fullmatch(r"(\d+)-(\d+)", word)
    if span:
        return list(range(int(span[1]), int(span[2]) + 1))
    return [int(word) if word.isdecimal() else word]


def _cells(words: Sequence[str]) -> list[str]:
    """The identities of every cell of a sweep, the final runs of each candidate included."""
    plan = make_plan(find_sweep(words[0]), parse_settings(list(words[1:])))
    finals = [cell for group in plan.groups for part in group.finals for cell in part.values()]
    grids = [cell for group in plan.groups for cell in group.grid.values()]
    return sorted({cell.identity for cell in (*grids, *finals)})


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tracking.export",
        description="Write finished runs to a file that outlives their database.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="written; such as memory.jsonl.gz")
    add("words", nargs="*", metavar="RUN | KEY=VALUE", help="which runs; default: all")
    add("--sweep", nargs="+", metavar="WORD", help="runs of a sweep: its name and KEY=VALUE")
    add("--artifacts", action="store_true", help="keep the files that the runs have made")
    add("--without", default=EVERY_STEP, metavar="PATTERN",
        help=f"metrics that are left out (default: {EVERY_STEP}; '' keeps all)")
    add("-m", "--mongo_db", metavar="HOST:PORT:DB", help="as in experiments.train")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
