"""The errors a user of the experiments can meet; each is one line saying what to do."""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from typing import NoReturn

from bson.errors import BSONError
from pymongo.errors import PyMongoError

from experiments.tracking import signals
from experiments.tracking.values import told


class UserError(ValueError):
    """A mistake in how a run was asked for: printed as one line, exit status 1."""


class TrackingError(RuntimeError):
    """The run's record is not safely in the database."""


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


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """A command's main function; 1 after an error that is one line, 128 + signal if stopped."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            with signals.handled():
                status = main(argv)
                sys.stdout.flush()
                return status
        except BrokenPipeError:  # whoever read the output has seen enough: `--list | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (UserError, PyMongoError, BSONError, OSError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            number = signal.Signals(getattr(stop, "signum", signal.SIGINT))
            print(f"stopped by {number.name}; the same command does the rest", file=sys.stderr)
            return 128 + number

    return run
