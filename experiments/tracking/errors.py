"""The errors a user of the experiments can meet; each is one line saying what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from sacred.utils import SacredInterrupt


class UserError(ValueError):
    """A mistake in how a run was asked for: printed as one line, exit status 1."""


class TrackingError(RuntimeError):
    """The run's record is not safely in the database."""


class Terminated(SacredInterrupt):
    """A signal but Ctrl-C: Sacred records the run as INTERRUPTED.

    Args:
        signum: the signal's number; the process exits with 128 + signum.
    """

    STATUS = "INTERRUPTED"

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, else an empty string."""
    known = list(known)
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    matches = get_close_matches(name, known, n=1, cutoff=0.6)
    by_leaf = get_close_matches(name.rpartition(".")[2], leaves, n=1, cutoff=0.6)
    found = matches[0] if matches else leaves[by_leaf[0]] if by_leaf else None
    return f"; did you mean {found!r}?" if found else ""
