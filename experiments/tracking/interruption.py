"""Signals that ask a run to end: SIGINT (Ctrl-C), SIGTERM, SIGHUP.

The first one ends the run where it is, or, within `deferred`, at the next `check`, at the latest
after `GRACE` seconds. A second Ctrl-C ends it at once. Signals belong to the process, and
so does the state kept here.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from experiments.tracking.errors import Terminated

GRACE = 2.5
"""Seconds for what should not be left half done."""

SAME = 0.3
"""Seconds within which a second Ctrl-C is the first: a terminal and a launcher both send it."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Request:
    """What has been asked of this process."""

    def __init__(self) -> None:
        self.signum = 0
        self.at = 0.0
        self.urgent = False
        self.deferring = self.holding = False


_request = _Request()


def asked() -> bool:
    """Whether a signal has asked the run to end."""
    return _request.signum != 0


def urgent() -> bool:
    """Whether it should end at once: nothing more is to be saved or waited for."""
    return _request.urgent


def check() -> None:
    """End the run here if a signal has asked for it.

    Raises:
        KeyboardInterrupt, Terminated: it has.
    """
    if asked():
        _raise()


@contextmanager
def handled() -> Iterator[None]:
    """Take the signals while this lasts; only a main thread can."""
    global _request
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request = _Request()
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _on_alarm)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _request = _Request()


@contextmanager
def deferred() -> Iterator[None]:
    """A signal that comes within waits for a `check` after this block, or until `GRACE` is over."""
    _request.deferring = True
    try:
        yield
    finally:
        _request.deferring = _request.holding = False
        if asked():
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def hold() -> None:
    """From here to its end the block of `deferred` is not to be left half done: no more grace."""
    _request.holding = _request.deferring


def _raise() -> NoReturn:
    if _request.signum == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(_request.signum)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if not asked():
        _request.signum, _request.at = signum, now
        if not _request.deferring:
            _raise()
        signal.setitimer(signal.ITIMER_REAL, GRACE)
    elif signum == signal.SIGINT and now - _request.at > SAME:
        _request.urgent = True
        raise KeyboardInterrupt


def _on_alarm(signum: int, frame: FrameType | None) -> None:
    if _request.deferring and not _request.holding:
        _raise()
