"""A run's state on disk, so that a killed run ends as if it had not been.

    python -m experiments.train resume=latest
    python -m experiments.train resume=17

A run's folder (``output``/run id) holds ``config.json``, written at the start, and
``checkpoint.pt``, replaced as a whole at every ``checkpoint_seconds`` and gone at the end. A
resumed run is a new run with the old one's configuration, whose record begins with a copy of all
that was recorded before the checkpoint.
"""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.tracking import UserError
from l2l_implicit import checks

CONFIG, STATE = "config.json", "checkpoint.pt"


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Start a run's folder: what the run is, and no checkpoint yet."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STATE).unlink(missing_ok=True)  # of another database's run with the same number
    text = json.dumps({k: v for k, v in config.items() if k != "resume"}, indent=1)
    _replace(folder / CONFIG, text.encode())


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the folder's checkpoint; whoever is killed here leaves the old one whole."""
    path = folder / STATE
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        torch.save({**state, "generators": _generators()}, file)
        _settle(file)
    os.replace(temporary, path)


def load(folder: Path) -> dict[str, Any]:
    """The folder's checkpoint; global random generators are put where they were.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / STATE
    try:
        state: dict[str, Any] = torch.load(path, weights_only=False)
    except FileNotFoundError:
        raise UserError(
            f"resume: expected a checkpoint {path}, got none; the run ended, or was killed before "
            "its first: start it anew"
        ) from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"resume: expected a checkpoint, got {path}: {error}") from error
    _restore_generators(state["generators"])
    return state


def remove(folder: Path) -> None:
    """A finished run has nothing to resume."""
    (folder / STATE).unlink(missing_ok=True)


def arguments(argv: Sequence[str]) -> list[str]:
    """The command line in Sacred's terms: ``resume=`` stands for the old run's configuration.

    Raises:
        UserError: no such run.
    """
    asked = [a for a in argv[1:] if a.startswith("resume=")]
    if not asked:
        return list(argv)
    others = [a for a in argv[1:] if not a.startswith("resume=") and a != "with"]
    options = [a for i, a in enumerate(others) if a.startswith("-") or _is_value(others, i)]
    updates = [a for a in others if a not in options]
    output = next((u.partition("=")[2] for u in updates if u.startswith("output=")), "runs")
    folder = find(Path(output), asked[-1].partition("=")[2])
    return [argv[0], *options, "with", str(folder / CONFIG), f"resume={folder}", *updates]


def _is_value(arguments: Sequence[str], index: int) -> bool:
    """Whether an argument belongs to the option before it."""
    return index > 0 and arguments[index - 1] in ("-m", "-c", "-b", "-n", "-l", "-p")


def find(output: Path, which: str) -> Path:
    """The folder of a run by its number, by its path, or the one with the newest checkpoint.

    Raises:
        UserError: no such run.
    """
    known = {path.parent.name: path.parent for path in output.glob(f"*/{STATE}")}
    if which == "latest":
        if not known:
            raise UserError(
                f"resume: expected a run with a checkpoint in {output}/, got none; runs that ended "
                "have none, output=FOLDER looks elsewhere"
            )
        return max(known.values(), key=lambda folder: (folder / STATE).stat().st_mtime)
    if (Path(which) / CONFIG).is_file():
        return Path(which)
    try:
        checks.choice("resume", which, ["latest", *sorted(known)])
    except ValueError as error:
        raise UserError(f"{error} (runs with a checkpoint in {output}/)") from error
    return known[which]


def _generators() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(),
             "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_generators(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".new")
    with temporary.open("wb") as file:
        file.write(content)
        _settle(file)
    os.replace(temporary, path)


def _settle(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
