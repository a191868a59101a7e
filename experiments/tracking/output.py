"""What is kept of a run's printed output."""

from __future__ import annotations

import threading

from sacred.utils import apply_backspaces_and_linefeeds

HEAD, TAIL = 200_000, 800_000
"""Characters kept of a longer output: its beginning, and its end with the results or errors.
Sacred stops recording a run whose output exceeds the 16 MB of a document."""

CUT = f"\n[... output cut here: the first {HEAD} and the last {TAIL} characters are kept ...]\n"


def keep_output(text: str) -> str:
    """Draw progress bars as a terminal would, and cut the middle out of a very long output.

    Sacred passes all that was kept before with what is new; a second cut removes the first mark.
    """
    if "\r" in text or "\b" in text:
        text = "\n".join(_drawn(line) for line in text.split("\n"))
    if len(text) <= HEAD + len(CUT) + TAIL:
        return text
    return text[:HEAD] + CUT + text[-TAIL:]


def _drawn(line: str) -> str:
    if "\r" not in line and "\b" not in line:
        return line
    return str(apply_backspaces_and_linefeeds(line))


class Tape:
    """What is printed until it is read: stands in for Sacred's StringIO, which keeps it for good.

    Sacred reads in one thread what others write: here nothing is lost between the two.
    """

    closed = False

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._guard = threading.Lock()

    def write(self, text: str) -> int:
        """Keep the text."""
        with self._guard:
            self._parts.append(text)
        return len(text)

    def read(self) -> str:
        """All that has been written since the last call."""
        with self._guard:
            parts, self._parts = self._parts, []
        return "".join(parts)

    def seek(self, position: int) -> int:
        """Nothing: what was read is gone."""
        return 0

    tell = flush = close = lambda self: 0
