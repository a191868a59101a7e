"""Keep the database up for viewers, and print its address.

    python -m experiments.tracking.serve

Ctrl-C ends it; the embedded server stops when no run needs it either. The address is a socket that
only you can reach: for `mongosh`, pymongo, and `omniboard --mu`.
"""

import contextlib
import signal
import sys
import threading

from experiments.tracking.database import Database, choose
from experiments.tracking.errors import CommandLine, UserError, one_line

if __name__ == "__main__":
    try:
        words = CommandLine("tracking.serve", "Keep the database up, and print its address.")
        database = Database(choose(words.parse_args().mongo_db))
        print(database.address, flush=True)
    except (UserError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    while not done.wait(1.0):
        with contextlib.suppress(UserError):
            database.revive()
    database.close()
