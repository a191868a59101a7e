"""Upload the record of a run whose database had gone away.

    python -m experiments.tracking.upload FILE...

The database is the one a run would use; `-m HOST:PORT:DB` names another. A file is removed when
everything is in the database.
"""

import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from experiments.tracking.database import Database, choose
from experiments.tracking.errors import CommandLine, UserError, command, one_line
from experiments.tracking.uploader import upload_journal
from experiments.tracking.values import told


@command
def main(argv: Sequence[str] | None) -> int:
    """The command line; 1 if a file is kept."""
    parser = CommandLine("tracking.upload", "Upload records of runs whose database had gone away.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    options, failed = parser.parse_args(argv), False
    with closing(Database(choose(options.mongo_db))) as opened:
        for file in options.files:
            try:
                if (uploader := upload_journal(file, opened.documents)) is None:
                    raise UserError(f"{file} belongs to a run that still goes on")
                status = f"{uploader.document.get('status')}, in {opened.label}"
                said = f"run {uploader.run_id}: {status}{uploader.how_it_ended()}"
                if uploader.run_id is None:
                    said = f"{file}: its run had recorded nothing when it was killed"
                print(told(said), flush=True)
            except Exception as error:  # whatever a database answers; the file is kept
                gone = "; a later run may have uploaded it" * isinstance(error, FileNotFoundError)
                said = opened.redacted(one_line(error)) + gone
                which = "" if str(file) in said else told(f"{file}: ")
                print(f"error: {which}{said}", file=sys.stderr)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
