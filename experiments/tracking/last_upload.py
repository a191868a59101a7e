"""The upload at a run's end: patient with a database that is away, unless somebody waits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from experiments.tracking import signals

PATIENCE_VARIABLE = "L2L_IMPLICIT_MONGO_PATIENCE"
PATIENCE = 30.0
"""Seconds a database that is away may take to come back."""

INTERRUPTED, HURRIED = 1.5, 0.5
"""Seconds the whole of it may take after one Ctrl-C, and after two."""


class LastUpload:
    """Try again and again, in a thread that can be left behind where it takes too long.

    Args:
        attempt: one upload; returns the error if it failed.
        after: the thread of the uploads before, which is ending.
    """

    def __init__(self, attempt: Callable[[], Exception | None], after: threading.Thread) -> None:
        self._attempt, self._after = attempt, after
        self._answers: list[Exception | None] = []
        self._thread = threading.Thread(target=self._work, name="last upload", daemon=True)
        self._patience = float(os.environ.get(PATIENCE_VARIABLE) or PATIENCE)

    def run(self) -> Exception | None:
        """The last error if the database has not taken everything in time."""
        limit = None
        if signals.asked():
            limit = HURRIED if signals.urgent() else INTERRUPTED
            self._patience = min(self._patience, limit)
        self._thread.start()
        self._thread.join(limit)
        return self._answers[0] if self._answers else TimeoutError("no answer in time")

    def is_left_behind(self) -> bool:
        """Whether it still goes on; the end of the process ends it."""
        return self._thread.is_alive()

    def _work(self) -> None:
        self._after.join()  # ends: every request to the database has a time limit
        deadline = time.monotonic() + self._patience
        while (error := self._attempt()) is not None and time.monotonic() < deadline:
            time.sleep(0.5)
        self._answers.append(error)
