"""Keep the database up for viewers, and print its address.

    python -m experiments.tracking.serve

Ctrl-C ends it; the embedded server stops when no run needs it either. The address is a socket that
only you can reach: for `mongosh`, pymongo, and `omniboard --mu`.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import closing, suppress

from experiments.tracking.database import Database, choose
from experiments.tracking.errors import CommandLine, UserError, command


@command
def main(argv: Sequence[str] | None) -> int:
    """The command line; 0 after Ctrl-C or SIGTERM."""
    words = CommandLine("tracking.serve", "Keep the database up, and print its address.")
    with closing(Database(choose(words.parse_args(argv).mongo_db))) as database:
        print(database.address, flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1.0)
                with suppress(UserError):
                    database.revive()
    return 0


if __name__ == "__main__":
    sys.exit(main())
