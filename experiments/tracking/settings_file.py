"""Settings from outside are plain data: Sacred's own readers make objects of them, by any code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sacred import arg_parser, ingredient, initialize
from sacred.config.utils import normalize_or_die

from experiments.tracking.errors import UserError


def load(filename: str) -> Any:
    """The settings in a file of JSON (``with FILE.json``).

    Raises:
        UserError: it is something else.
    """
    try:
        settings = json.loads(Path(filename).read_bytes())
        if isinstance(settings, dict):
            return normalize_or_die(settings)
        reason = f"a {type(settings).__name__}"
    except (OSError, ValueError, KeyError, RecursionError) as error:
        reason = str(error).partition(".")[0]
    raise UserError(f"{filename}: expected a JSON object of settings, plain data, got {reason}")


def _plain(value: Any) -> Any:
    try:
        return normalize_or_die(value)
    except KeyError as error:
        raise ValueError("text, then") from error


def install() -> None:
    """Let Sacred read such files, and the values of a command line, as plain data."""
    initialize.load_config_file = ingredient.load_config_file = load
    arg_parser.restore = _plain
