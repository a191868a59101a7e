"""Write finished runs to a file that outlives their database.

    python -m experiments.tracking.export docs/records/memory.jsonl.gz 3 7-9
    python -m experiments.tracking.export FILE experiment.name=memory status=COMPLETED

Words are numbers of runs and KEY=VALUE for fields of their documents; without any, all runs that
have ended. A run is a line of JSON: its document, and its metrics but those of every step
(`--without` names them). Names of folders are replaced; source files are named by their md5. The
printed output and artifacts stay in the database. `experiments.report --records FILE` and
`experiments.report.get_results(records=[FILE])` read it; so does pandas.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.tracking.config import plain_value
from experiments.tracking.database import open_database
from experiments.tracking.errors import CommandLine, UserError, command, one_line
from experiments.tracking.records import DatabaseRecords, Document, RunId, group
from experiments.tracking.whole_file import write_whole

# Metrics with a point at every outer iteration, as a pattern of their names.
EVERY_STEP = r"^train/"
REMOTE = re.compile(r"(https?|ssh|git)://|[\w.-]+@[\w.-]+:")
INSTALLED = re.compile(r"/[^\s\"':]*/(?=site-packages/|lib/python3)")


@command
def main(argv: Sequence[str] | None) -> int:
    """The command line."""
    text = "Write finished runs to a file that outlives their database."
    parser = CommandLine("tracking.export", text)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="written; such as memory.jsonl.gz")
    add("words", nargs="*", metavar="RUN | KEY=VALUE", help="which runs; default: all")
    add("--without", default=EVERY_STEP, metavar="PATTERN",
        help=f"metrics that are left out, a regular expression (default: {EVERY_STEP}; '': none)")
    options = parser.parse_intermixed_args(argv)
    try:
        re.compile(options.without)
        with open_database(options.mongo_db) as documents:
            records = DatabaseRecords(documents, _question(options.words))
            if not records.runs:
                raise UserError("no run that has ended fits; nothing is written")
            _write(options.file, records, options.without)
    except (ValueError, OverflowError, re.error) as error:  # of words that no run can have
        raise UserError(one_line(error)) from error
    size = options.file.stat().st_size / 1024
    print(f"{len(records.runs)} runs, {size:.0f} KiB: {options.file}", flush=True)
    return 0


def _question(words: Iterable[str]) -> Document:
    """Words that name no run choose none: only without any word are all chosen."""
    numbers: list[Document] = []
    fields: list[Document] = [{"status": {"$in": ["COMPLETED", "FAILED", "INTERRUPTED"]}}]
    for word in words:
        key, equals, text = word.partition("=")
        span = re.fullmatch(r"(\d+)-(\d+)", word)
        if equals and (not key or key.startswith("$")):
            raise UserError(f"expected KEY=VALUE with a field of a run, got {word!r}")
        if equals:
            fields.append({key: {"$eq": plain_value(text)}})
        elif not span:
            numbers.append({"_id": int(word) if word.isdecimal() else word})
        elif int(span[1]) > int(span[2]):
            tried = f"write {span[2]}-{span[1]}"
            raise UserError(f"expected the smaller number first, got {word}; {tried}")
        else:
            numbers.append({"_id": {"$gte": int(span[1]), "$lte": int(span[2])}})
    return {"$and": [*fields, *([{"$or": numbers}] if numbers else [])]}


def _write(path: Path, records: DatabaseRecords, without: str) -> None:
    """The same records make the same file; it is there as a whole, or as it was."""
    metrics: dict[RunId, dict[str, Any]] = {run["_id"]: {} for run in records.runs}
    for run, name, series, fault in records.metrics(list(metrics), without=without):
        if fault:
            raise UserError(f"run {run}: {fault}; mend the run's record, or export the others")
        metrics[run][name] = series._asdict()
    entries = ({"runs": _hidden(run), "metrics": metrics[run["_id"]]} for run in records.runs)
    lines = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    write_whole(path, gzip.compress(lines.encode(), 9, mtime=0))


def _hidden(run: Document) -> Document:
    """A run's document in which words stand for the folders of the machine that it ran on."""
    config = group(run, "config")
    places = [
        (group(run, "experiment").get("base_dir"), "."),
        (group(config, "tasks").get("root"), "DATA"),
        (config.get("output"), "runs"), (os.path.expanduser("~"), "~"),
    ]  # fmt: skip
    words = {place.rstrip("/"): word for place, word in places
             if isinstance(place, str) and re.match("/.", place)}  # fmt: skip
    longest_first = map(re.escape, sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"({'|'.join([*longest_first, '(?!)'])})(?![\w.-])")

    def hidden(value: Any) -> Any:
        if isinstance(value, str):
            return INSTALLED.sub("", pattern.sub(lambda found: words[found[1]], value))
        if isinstance(value, dict):
            copy = {key: hidden(item) for key, item in value.items()}
            if isinstance(copy.get("url"), str) and not REMOTE.match(copy["url"]):
                copy["url"] = ""  # of a repository that was cloned from a folder
            return copy
        return [hidden(item) for item in value] if isinstance(value, list) else value

    return hidden(run)


if __name__ == "__main__":
    sys.exit(main())
