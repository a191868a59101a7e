"""The errors a user of the experiments can meet; each is one line saying what to do."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from experiments.tracking.values import told


class UserError(ValueError):
    """A mistake in how a run was asked for: printed as one line, exit status 1."""


class TrackingError(RuntimeError):
    """The run's record is not safely in the database."""


class Terminated(KeyboardInterrupt):
    """Signal ``signum``, not Ctrl-C; exit status 128 + signum.

    No ``except Exception`` on its way takes it for an error of a file or of a database.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


def wrong(name: str, expected: str, got: object, todo: str = "leave it out") -> UserError:
    """What is said of a setting or a file that will not do."""
    return UserError(f"{name}: expected {expected}, got {got}; {todo}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, else an empty string.

    What follows the last dot counts most: a setting is more often looked for in the wrong group
    than under another name.
    """
    known = list(known)
    leaves = [key.rpartition(".")[2] for key in known]
    leaf = get_close_matches(name.rpartition(".")[2], leaves, n=1, cutoff=0.6)
    same = [key for key, its in zip(known, leaves, strict=True) if its in leaf]
    found = get_close_matches(name, same or known, n=1, cutoff=0.0 if same else 0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def one_line(error: BaseException) -> str:
    """Its message, or else its kind, in one line without passwords."""
    return told(str(error)) or type(error).__name__


def reason(error: BaseException) -> str:
    """The same of a readable length."""
    text = one_line(error)
    return text if len(text) <= 150 else f"{text[:150]} ..."


class CommandLine(ArgumentParser):
    """The words of a command that reads runs, with ``-m``."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=f"python -m experiments.{name}", description=description)
        where = {"metavar": "HOST:PORT:DB", "help": "as in experiments.train"}
        self.add_argument("-m", "--mongo_db", **where)

    def error(self, message: str) -> NoReturn:
        """Exit status 2; one of the words may be a password."""
        super().error(told(message))
