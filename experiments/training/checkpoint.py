"""A run's state on disk, so that a killed run ends as if it had not been.

    python -m experiments.train resume=latest
    python -m experiments.train resume=17

A run's folder (``output``/run id) holds ``config.json``, for people; ``lock``, held by the process
that works in it; and ``checkpoint.pt``, gone at the end: plain data in torch's format, the settings
among them, and their SHA-256. It is replaced as a whole at every ``checkpoint_seconds`` and before
what a signal breaks off. A resumed run is a new run with the old one's settings, whose record
begins with a copy of all that was recorded before the checkpoint.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import platform
import random
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sacred.utils import iterate_flattened

from experiments.tracking import TrackingError, UserError, socket_server, wrong
from experiments.tracking.errors import reason
from experiments.tracking.whole_file import write_whole
from l2l_implicit.inner_problem.boundary import tensors_of

CONFIG, STATE, LOCK = "config.json", "checkpoint.pt", "lock"
METRICS, PARAMETERS, EARLY = "metrics.csv", "parameters.pt", "early_stopped_parameters.pt"
# What a resumed run may set anew; all else would hold for a part of the result only. A step size
# that decays over the iterations depends on their number.
MAY_DIFFER = ("iterations", "checkpoint_seconds", "metrics_csv", "output", "resume")
THIS_VERSION = "a checkpoint of this version"
_CHECKSUM = hashlib.sha256().digest_size
_held: dict[Path, int] = {}  # descriptors of their locks


def new_folder(output: Path, name: str) -> Path:
    """``output/name``, locked; ``name-2`` and so on where a run of another database has that."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = output / (name if number == 1 else f"{name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                break
    except OSError as error:
        got = f"{str(output)!r} ({error.strerror})"
        raise wrong("output", "a folder to write to", got, "try runs") from error
    lock(folder)
    return folder


def lock(folder: Path) -> None:
    """Hold the folder until `remove` or the end of this process, whatever ends it.

    UserError: a process that is alive works in it.
    """
    if folder.resolve() in _held:
        return
    with in_one_line(folder / LOCK):
        file = socket_server.open_lock(folder / LOCK)
        try:
            free = socket_server.try_lock(file)
        except OSError as error:
            free = True
            print(f"warning: no lock on {folder} ({error.strerror}): let no two runs work in it")
        if not free:
            who = os.pread(file, 80, 0).decode(errors="replace")
            got = f"{folder}, where process {who if who.isprintable() else '?'} is at work"
            raise wrong("resume", "a run that has ended", got, "wait for its end")
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} on {platform.node()}".encode(), 0)
    _held[folder.resolve()] = file


def settings_text(config: Mapping[str, Any]) -> str:
    """A run's settings as JSON, but for what it resumes."""
    return json.dumps({k: v for k, v in config.items() if k != "resume"}, indent=1)


def remove(folder: Path) -> None:
    """A finished run has nothing to resume; what a kill left half written goes too."""
    with in_one_line(folder):
        drafts = [_draft(folder / name) for name in (CONFIG, STATE, METRICS, PARAMETERS, EARLY)]
        for path in (folder / STATE, *drafts, folder / LOCK):
            path.unlink(missing_ok=True)
    if (file := _held.pop(folder.resolve(), None)) is not None:
        os.close(file)


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the folder's checkpoint, as `replace` does."""

    def write(file: io.BytesIO) -> None:
        torch.save({**state, "generators": generators()}, file)
        file.write(hashlib.sha256(file.getbuffer()).digest())

    replace(folder / STATE, write)


def load(folder: Path) -> dict[str, Any]:
    """The folder's checkpoint, on the CPU; none of it can run code.

    UserError: there is none, or it is damaged or another version's.
    """
    path = folder / STATE
    with in_one_line(path):
        if not path.is_file():
            raise wrong("resume", f"a checkpoint {path}", "none",
                        "the run has ended, or none is written yet: start it anew")
        content = path.read_bytes()
        whole, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
        if hashlib.sha256(whole).digest() != checksum:
            raise ValueError("its checksum does not fit, so that it is damaged")
        state = plain_data(whole)
        return {**state, "settings": dict(json.loads(state["settings"]))}


def plain_data(content: bytes) -> Any:
    """What torch has saved, on the CPU; none of it can run code, or is larger than the file."""
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            if sum(part.file_size for part in parts.infolist()) > len(content):
                raise ValueError("it is packed, and larger in memory")
    state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    for tensor in tensors_of(state):
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError("a tensor in it is larger than what is stored of it")
    return state


def find(output: Path, which: str) -> Path:
    """The folder of a run by its number, by its path, or the one with the newest checkpoint."""
    with in_one_line(output):
        if Path(which).is_dir():
            return Path(which)
        found = sorted(output.glob(f"*/{STATE}"), key=lambda path: path.stat().st_mtime)
    known = {"latest" if which == "latest" else path.parent.name: path.parent for path in found}
    if which not in known:
        expected = "latest, a run's folder, or a run with a checkpoint in"
        raise wrong("resume", f"{expected} {output}/ ({', '.join(known) or 'there is none'})",
                    repr(which), "a run that ended has none, output=FOLDER looks elsewhere")
    return known[which]


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """UserError for settings that are not those the run was started with; names each."""
    old, new = (dict(iterate_flattened(settings))
                for settings in (before, json.loads(settings_text(now))))  # fmt: skip
    may = set(MAY_DIFFER)
    if old.get("meta_lr_schedule") == "cosine":
        may.remove("iterations")
    other = [key for key in {**old, **new} if old.get(key) != new.get(key) and key not in may]
    if other and not any(key in old and key in new for key in other):
        got = f"one of a version whose settings differ in {', '.join(other)}"
        raise wrong("resume", THIS_VERSION, got, "go on with that version, or start anew")
    if other:
        differ = ", ".join(f"{key}={new.get(key)!r} (it has {old.get(key)!r})" for key in other)
        raise wrong("resume", "the run's own settings", differ, "leave that out, or start anew")


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
    for device, its in zip(range(torch.cuda.device_count()), state.get("cuda", ()), strict=False):
        torch.cuda.set_rng_state(its, device)


def _draft(path: Path) -> Path:
    return path.with_suffix(".new")


def replace(path: Path, write: Callable[[io.BytesIO], object]) -> None:
    """`write_whole`, of what is written; UserError: it cannot be."""
    content, draft = io.BytesIO(), _draft(path)
    write(content)
    with in_one_line(path):
        draft.unlink(missing_ok=True)  # of a run that was killed; it may be a link
        write_whole(path, content.getbuffer(), draft)


@contextmanager
def in_one_line(path: Path) -> Iterator[None]:
    """Whatever goes wrong within is a UserError about this file."""
    try:
        yield
    except (TrackingError, UserError):
        raise
    except OSError as error:
        raise wrong(str(path), "to be able to read and write it", error.strerror or error,
                    "mend that, or choose another folder (output=FOLDER)") from error
    except Exception as error:  # torch's reader of plain data raises what its bytes lead to
        raise wrong("resume", THIS_VERSION, f"{path}: {reason(error)}", "start anew") from error
