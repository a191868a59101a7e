"""Signals that ask a run to end: Ctrl-C, and what a system or a cluster sends before it kills.

The first one sets a flag. It ends the run where it is, or, within `deferred`, at the next `check`.
Another one, a moment later, ends it at once. Signals belong to the process, and so does the flag.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGALRM, signal.SIGXCPU)  # fmt: skip
SAME = 0.3
"""Seconds within which another signal is the first: a terminal and a launcher both send it."""


class Terminated(KeyboardInterrupt):
    """Signal ``signum``, not Ctrl-C; exit status 128 + signum.

    No ``except Exception`` on its way takes it for an error of a file or of a database.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


class _Request:
    """What has been asked of this process."""

    signum, at, urgent, deferring = 0, 0.0, False, False


_request = _Request()


def asked() -> bool:
    """Whether a signal has asked the run to end."""
    return _request.signum != 0


def urgent() -> bool:
    """Whether it should end at once: nothing more is to be saved or waited for."""
    return _request.urgent


def check() -> None:
    """End the run here, by KeyboardInterrupt or Terminated, if a signal has asked for it."""
    if _request.signum == signal.SIGINT:
        raise KeyboardInterrupt
    if asked():
        raise Terminated(_request.signum)


@contextmanager
def handled() -> Iterator[None]:
    """Take the signals while this lasts; only a main thread can. What ``nohup`` does is kept."""
    global _request
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request = _Request()
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS
              if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)}  # fmt: skip
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _request = _Request()


@contextmanager
def deferred() -> Iterator[None]:
    """What is within is not broken off by the first signal, which waits for a `check`."""
    outer, _request.deferring = _request.deferring, True
    try:
        yield
    finally:
        _request.deferring = outer


def _on_signal(signum: int, frame: object) -> None:
    now, first = time.monotonic(), not asked()
    if first or now - _request.at >= SAME:
        _request.signum, _request.at, _request.urgent = signum, now, not first
        if _request.urgent or not _request.deferring:
            check()
