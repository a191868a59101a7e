"""Upload the record of a run whose database had gone away.

    python -m experiments.tracking.upload FILE...

The database is the one a run would use; `-m HOST:PORT:DB` names another. A file is removed when
everything is in the database.
"""

import sys
from pathlib import Path

from experiments.tracking.database import Database, choose
from experiments.tracking.errors import CommandLine, UserError, one_line
from experiments.tracking.uploader import upload_journal
from experiments.tracking.values import told

if __name__ == "__main__":
    parser = CommandLine("tracking.upload", "Upload records of runs whose database had gone away.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    try:
        opened = Database(choose(arguments.mongo_db))
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    failed = False
    for file in arguments.files:
        try:
            if (uploader := upload_journal(file, opened.documents)) is None:
                raise UserError(f"{file} belongs to a run that still goes on")
            status = f"{uploader.document.get('status')}, in {opened.label}"
            print(told(f"run {uploader.run_id}: {status}{uploader.how_it_ended()}"), flush=True)
        except Exception as error:  # whatever a database answers; the file is kept
            gone = "; a later run may have uploaded it" * isinstance(error, FileNotFoundError)
            said = opened.redacted(one_line(error)) + gone
            which = "" if str(file) in said else told(f"{file}: ")
            print(f"error: {which}{said}", file=sys.stderr)
            failed = True
    opened.close()
    sys.exit(failed)
