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

import argparse
import ast
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bson.errors import BSONError
from pymongo.errors import PyMongoError

from experiments.tracking.database import Database, choose
from experiments.tracking.errors import UserError
from experiments.tracking.records import (
    EVERY_STEP,
    DatabaseRecords,
    Document,
    printable,
    write_records,
)

ENDED = ("COMPLETED", "FAILED", "INTERRUPTED")
REMOTE = re.compile(r"(https?|ssh|git)://|[\w.-]+@[\w.-]+:")
INSTALLED = re.compile(r"/[^\s\"':]*/(?=site-packages/|lib/python3)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 1 after an error that is one line."""
    options = _parse(argv)
    try:
        re.compile(options.without)
        database = Database(choose(options.mongo_db))
        try:
            records = DatabaseRecords(database.documents, _question(options.words))
            if not records.runs:
                raise UserError("no run that has ended fits; nothing is written")
            records.runs = [hidden(run) for run in records.runs]
            size = write_records(options.file, records, options.without)
        finally:
            database.close()
    except (UserError, PyMongoError, BSONError, OverflowError, OSError, re.error) as error:
        print("error: " + printable(" ".join(str(error).split())), file=sys.stderr)
        return 1
    print(f"{len(records.runs)} runs, {size / 1024:.0f} KiB: {options.file}")
    return 0


def _question(words: Iterable[str]) -> Document:
    """Words that name no run choose none: only without any word are all chosen."""
    words = list(words)
    numbers = [_numbers(word) for word in words if "=" not in word]
    pairs = [_pair(word) for word in words if "=" in word]
    chosen: list[Document] = [{"$or": numbers}] if numbers else []
    return {"$and": [*chosen, *pairs, {"status": {"$in": list(ENDED)}}]}


def _numbers(word: str) -> Document:
    span = re.fullmatch(r"(\d+)-(\d+)", word)
    if not span:
        return {"_id": int(word) if word.isdecimal() else word}
    first, last = int(span[1]), int(span[2])
    if first > last:
        raise UserError(f"expected the smaller number first, got {word}; write {last}-{first}")
    return {"_id": {"$gte": first, "$lte": last}}


def _pair(word: str) -> Document:
    key, _, text = word.partition("=")
    if not key or key.startswith("$"):
        raise UserError(f"expected KEY=VALUE with a field of a run, got {word!r}")
    try:
        return {key: {"$eq": ast.literal_eval(text)}}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {key: {"$eq": text}}


def hidden(run: Document) -> Document:
    """A run's document in which words stand for the folders of the machine that it ran on."""
    config, experiment = run.get("config"), run.get("experiment")
    tasks = config.get("tasks") if isinstance(config, dict) else None
    folders = {
        _get(experiment, "base_dir"): ".", _get(tasks, "root"): "DATA",
        _get(config, "output"): "runs", str(Path.home()): "~",
    }  # fmt: skip
    longest = sorted((f for f in folders if isinstance(f, str) and re.match("/.", f)), key=len)
    words = [(re.compile(re.escape(f.rstrip("/")) + r"(?![\w.-])"), folders[f])
             for f in reversed(longest)]  # fmt: skip
    return _hidden(run, words)


def _get(document: Any, name: str) -> Any:
    """An entry that can be a key; others name no folder."""
    value = document.get(name) if isinstance(document, dict) else None
    return value if isinstance(value, str) else None


def _hidden(value: Any, words: Sequence[tuple[re.Pattern[str], str]]) -> Any:
    if isinstance(value, str):
        for pattern, word in words if "/" in value else ():
            value = pattern.sub(word, value)
        return INSTALLED.sub("", value)
    if isinstance(value, Mapping):
        copy = {key: _hidden(item, words) for key, item in value.items()}
        if isinstance(copy.get("url"), str) and not REMOTE.match(copy["url"]):
            copy["url"] = ""  # of a repository that was cloned from a folder
        return copy
    return [_hidden(item, words) for item in value] if isinstance(value, list) else value


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tracking.export",
        description="Write finished runs to a file that outlives their database.",
    )
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="written; such as memory.jsonl.gz")
    add("words", nargs="*", metavar="RUN | KEY=VALUE", help="which runs; default: all")
    add("--without", default=EVERY_STEP, metavar="PATTERN",
        help=f"metrics that are left out, a regular expression (default: {EVERY_STEP}; '': none)")
    add("-m", "--mongo_db", metavar="HOST:PORT:DB", help="as in experiments.train")
    return parser.parse_intermixed_args(argv)


if __name__ == "__main__":
    sys.exit(main())
