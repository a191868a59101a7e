"""Upload the record of a run whose database had gone away.

    python -m experiments.tracking.upload FILE...

The database is the one a run would use; `-m HOST:PORT:DB` names another.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pymongo.errors import PyMongoError

from experiments.tracking.database import Database, choose
from experiments.tracking.errors import TrackingError, UserError
from experiments.tracking.uploader import upload_journal


def main(argv: list[str] | None = None) -> None:
    """Upload each file; it is removed when everything is in the database."""
    parser = argparse.ArgumentParser(prog="python -m experiments.tracking.upload", description=
                                     "Upload the records of runs whose database had gone away.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("-m", "--mongo_db", metavar="HOST:PORT:DB")
    arguments = parser.parse_args(argv)
    try:
        database = Database(choose(arguments.mongo_db))
        try:
            for path in arguments.files:
                _upload(path, database)
        finally:
            database.close()
    except (UserError, TrackingError, PyMongoError) as error:
        sys.exit(f"error: {error}")


def _upload(path: Path, database: Database) -> None:
    try:
        uploader = upload_journal(path, database.documents)
    except FileNotFoundError:
        raise UserError(f"no file {path}; a later run may have uploaded it") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    if uploader is None:
        raise UserError(f"{path} belongs to a run that still goes on")
    print(f"run {uploader.run_id}: {uploader.document.get('status')}, in {database.label}")


if __name__ == "__main__":
    main()
