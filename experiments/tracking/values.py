"""What may be recorded: numbers for metrics, plain data without passwords, output that fits."""

from __future__ import annotations

import math
import operator
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

from bson import Binary, ObjectId
from sacred.metrics_logger import MetricsLogger
from sacred.serializer import flatten
from sacred.utils import apply_backspaces_and_linefeeds

INT64 = 2**63
# Characters kept of a longer output: its beginning, and its end with the results or errors.
# Sacred stops recording a run whose output exceeds the 16 MB of a document.
HEAD, TAIL = 200_000, 800_000
CUT = f"\n[... output cut here: the first {HEAD} and the last {TAIL} characters are kept ...]\n"
HIDDEN = "***"
# Whatever stands before the last `@` of a URL's host: a name and password, or a token.
USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]*(?:@[^/\s@'\"]*)*@")
LOGIN = re.compile(r"[^\s@'\"/:=]+:(?!//)[^\s@'\"]+@(?=\w)")  # the same without a scheme
# Shorter passwords are hidden inside URLs only: masking every `a` would ruin the record.
SHORTEST_SECRET = 6
# Options of a URL that are passwords, or hold a session's token.
SECRET_OPTIONS = ("tlscertificatekeyfilepassword", "ssl_pem_passphrase", "authmechanismproperties")
OPTION = re.compile(rf"\b({'|'.join(SECRET_OPTIONS)})=[^&\s'\"]+", re.IGNORECASE)


class CheckedMetrics(MetricsLogger):
    """Sacred's metrics logger with the checks made at the call, not in the observer."""

    # called with name, value, step and time of every point as it is logged
    sink: Callable[[str, float, int, datetime], None] | None = None

    def log_scalar_metric(self, metric_name: str, value: Any, step: int | None = None) -> None:
        """Log one value, which is in the run's journal when this returns; NaN stays NaN."""
        name = check_name(metric_name)
        number, whole = as_number(name, value), as_step(name, step)
        super().log_scalar_metric(name, number, whole)
        if self.sink is not None:
            now = datetime.now(UTC)
            self.sink(name, number, self._metric_step_counter[name], now)


def check_name(name: Any) -> str:
    """The metric's name; ValueError if it is empty or unprintable, or has a `$` or a dot.

    Reports split names at dots.
    """
    fits = isinstance(name, str) and name and name.isprintable()
    if not fits or "." in name or name.startswith("$"):
        raise ValueError(f"a metric's name is a string such as 'train/loss', got {name!r}")
    return name


def as_number(name: str, value: Any) -> float | int:
    """A Python number from a number or a one-element array or tensor; else TypeError."""
    number = _item(value)
    if isinstance(number, int):
        return int(number) if abs(number) < INT64 else float(number)
    if isinstance(number, float):
        return number
    raise TypeError(
        f"metric {name!r} must be a number or a one-element tensor, got {type(value).__name__}"
        + (f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else "")
    )


def as_step(name: str, step: Any) -> int | None:
    """A Python int, or None for the metric's own counter; else TypeError."""
    with suppress(TypeError):
        whole = None if step is None else operator.index(_item(step))
        if whole is None or abs(whole) < INT64:
            return whole
    raise TypeError(f"step of metric {name!r} must be an int of 64 bits, got {step!r}")


def _item(value: Any) -> Any:
    """The Python number in a numpy or torch scalar; other values unchanged."""
    one = hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1
    return value.item() if one else value


def storable(value: Any) -> Any:
    """Plain data: numpy and torch scalars as numbers, arrays as lists, huge ints as text.

    What MongoDB holds in no string, halves of surrogate pairs, is escaped; a name's first `$`, with
    which JSON spells MongoDB's own types, becomes Sacred's `@`.
    """
    value = _item(value)
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value) if abs(value) < INT64 else str(value)
    if value is None or isinstance(value, (bool, float, datetime, ObjectId, Binary)):
        return value
    if isinstance(value, Mapping):  # to which the run may add while it is read
        return {re.sub(r"^\$", "@", storable(str(k)).replace("\0", "\\0")): storable(v)
                for k, v in list(value.items())}  # fmt: skip
    if isinstance(value, (list, tuple, Set)):
        return [storable(item) for item in list(value)]
    return storable(value.tolist()) if hasattr(value, "tolist") else flatten(value)


def secrets_of(url: str) -> set[str]:
    """The strings of `url` that nobody else may read: passwords, as written and decoded."""
    match = USERINFO.match(url)
    userinfo = "" if match is None else match.group()[len(match["scheme"]) : -1]
    options = [option.partition("=") for option in url.partition("?")[2].split("&")]
    named = [value for name, _, value in options if name.lower() in SECRET_OPTIONS]
    written = {userinfo.partition(":")[2], *named, *(v.partition(":")[2] for v in named)}
    return {form for text in written for form in (text, unquote(text)) if form}


def redacted(value: Any, secrets: Iterable[str] = ()) -> Any:
    """A copy of nested data in which `***` stands for the secrets and the user of every URL.

    Secrets below `SHORTEST_SECRET` characters are hidden only where they stand in a URL.
    """
    if isinstance(value, str):
        for secret in sorted(secrets, reverse=True):
            value = value if len(secret) < SHORTEST_SECRET else value.replace(secret, HIDDEN)
        value = OPTION.sub(rf"\1={HIDDEN}", value)
        return USERINFO.sub(rf"\g<scheme>{HIDDEN}@", value) if "@" in value else value
    if isinstance(value, Mapping):
        return {redacted(k, secrets): redacted(item, secrets) for k, item in value.items()}
    return [redacted(v, secrets) for v in value] if isinstance(value, (list, tuple)) else value


def told(text: str) -> str:
    """Text for a terminal: one line without logins, and without what a terminal would obey."""
    return printable(LOGIN.sub(f"{HIDDEN}@", redacted(" ".join(text.split()))))


def is_name(text: str) -> bool:
    """Whether a run and its folder may be called so: it leads to nowhere else, and can be shown."""
    most = 16 if text.isdecimal() else 200  # a number follows; of 255 bytes, with a suffix
    fits = text.isprintable() and 0 < len(text.encode()) < most
    return fits and "/" not in text and text not in (".", "..")


def printable(text: str) -> str:
    r"""The text with what no one should print spelled out: control characters as ``\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def keep_output(text: str) -> str:
    """Draw progress bars as a terminal would, and cut the middle out of a very long output.

    Sacred passes all that was kept before with what is new; a second cut removes the first mark.
    """
    if "\r" in text or "\b" in text:
        text = "\n".join(
            str(apply_backspaces_and_linefeeds(line)) if "\r" in line or "\b" in line else line
            for line in text.split("\n")
        )
    return text if len(text) <= HEAD + len(CUT) + TAIL else text[:HEAD] + CUT + text[-TAIL:]


class Tape:
    """What is printed until it is read: stands in for Sacred's StringIO, which keeps it for good.

    One thread reads what others write, and nothing is lost between the two.
    """

    closed = False

    def __init__(self) -> None:
        self._parts: deque[str] = deque()  # whose ends are safe among threads

    def write(self, text: str) -> int:
        """Keep the text."""
        self._parts.append(text)
        return len(text)

    def read(self) -> str:
        """All that has been written since the last call."""
        return "".join(self._parts.popleft() for _ in range(len(self._parts)))

    seek = tell = flush = close = lambda self, position=0: 0
