"""One run of a sweep: its settings, its command line, and the identity that follows from them."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from experiments.tracking import UserError

Settings: TypeAlias = Mapping[str, Any]
"""Dotted configuration entries and their values, such as {"algorithm.lr": 0.1}."""

PLACES = ("tasks.root", "output")
"""Where things lie: a run is the same run on a machine that keeps them elsewhere."""

DIGITS = 16

STATES = ("completed", "running", "pending", "interrupted", "failed")
"""A cell's state: the words of Sacred's statuses, and pending where there is no run."""
COMPLETED, RUNNING, PENDING, INTERRUPTED, FAILED = STATES


@dataclass(frozen=True)
class Cell:
    """One run of an experiment with fixed settings.

    Args:
        module: run as ``python -m MODULE with ...``.
        configs: named configs, in their order.
        settings: everything set by key, the seed included.
    """

    module: str
    configs: tuple[str, ...]
    settings: Settings

    @property
    def identity(self) -> str:
        """A hash of all that was asked for, `PLACES` excepted: ``c`` and 16 hexadecimal digits.

        The letter keeps Sacred from reading a hash such as 12e45678 as a number.
        """
        kept = {key: _plain(v) for key, v in self.settings.items() if key not in PLACES}
        text = json.dumps([self.module, self.configs, kept], sort_keys=True, allow_nan=False)
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:DIGITS]

    def arguments(self) -> list[str]:
        """What follows ``with``; the identity is recorded as the entry ``cell``."""
        set_by_key = [f"{key}={format_value(v)}" for key, v in sorted(self.settings.items())]
        return [*self.configs, *set_by_key, f"cell={self.identity}"]


def parse_settings(words: list[str]) -> dict[str, Any]:
    """{"algorithm.lr": 0.1} from ["algorithm.lr=0.1"].

    Raises:
        UserError: a word that is not KEY=VALUE, or a key given twice.
    """
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise UserError(f"expected KEY=VALUE, got {word!r}; options start with --")
        if key in settings:
            raise UserError(f"{key} is given twice; give it once")
        settings[key] = parse_value(text)
    return settings


def parse_value(text: str) -> Any:
    """A Python literal, else the text itself, as Sacred reads its command line."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def format_value(value: Any) -> str:
    """The text that `parse_value` reads back."""
    if isinstance(value, str) and parse_value(value) == value:
        return value
    return repr(value)


def describe(settings: Settings) -> str:
    """``algorithm.lr=0.1 meta_lr=0.001``."""
    return " ".join(f"{key}={format_value(value)}" for key, value in settings.items())


def _plain(value: Any) -> Any:
    """120.0 and 120 are one setting."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
