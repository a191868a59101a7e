"""A run's state on disk, so that a killed run ends as if it had not been.

    python -m experiments.train resume=latest
    python -m experiments.train resume=17

A run's folder (``output``/run id) holds ``config.json``, written at the start, and
``checkpoint.pt``, replaced as a whole at every ``checkpoint_seconds`` and gone at the end. A
resumed run is a new run with the old one's configuration, whose record begins with a copy of all
that was recorded before the checkpoint.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from experiments.tracking import Terminated, UserError
from l2l_implicit import checks

CONFIG, STATE = "config.json", "checkpoint.pt"


def new_folder(output: Path, name: str) -> Path:
    """``output/name``; ``name-2`` and so on where a run of another database has that already."""
    output.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = output / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            break
    return folder


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Start a run's folder: what the run is."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({k: v for k, v in config.items() if k != "resume"}, indent=1)
    replace(folder / CONFIG, lambda file: file.write(text.encode()))


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the folder's checkpoint; whoever is killed here leaves the old one whole."""
    replace(folder / STATE, lambda file: torch.save({**state, "generators": generators()}, file))


def load(folder: Path) -> dict[str, Any]:
    """The folder's checkpoint; global random generators are put where they were.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / STATE
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"resume: expected a checkpoint {path}, got none; the run ended, or was killed before "
            "its first: start it anew"
        ) from None
    except Terminated:
        raise
    except Exception as error:  # torch's reader of plain data raises what its bytes lead to
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"resume: expected a checkpoint of this version, got {path}: {reason}; start anew"
        ) from error
    restore_generators(state["generators"])
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


def generators() -> dict[str, Any]:
    """The state of every global random generator, in types that load with ``weights_only``."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {"python": random.getstate(), "torch": torch.get_rng_state(),
             "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest)}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_generators(state: Mapping[str, Any]) -> None:
    """The inverse of `generators`."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def put_back_if_broken_off(network: nn.Module, stream: Any) -> Iterator[None]:
    """Where the block raises: buffers, global random generators and the stream as before it."""
    buffers = [buffer.clone() for buffer in network.buffers()]
    before, position = generators(), stream.state
    try:
        yield
    except BaseException:
        restore_generators(before)
        stream.state = position
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), buffers, strict=True):
                buffer.copy_(value)
        raise


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """The whole new file or the whole old one, whoever is killed and whenever power fails."""
    temporary = path.with_suffix(".new")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _settle(path.parent)


def _settle(folder: Path) -> None:
    """Force the folder's entries to the disk: the rename itself."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
