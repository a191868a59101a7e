"""Arrays that were expensive to make, kept in a file beside what they were made from."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray]


def kept_arrays(kept: Path, listing: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of an earlier call if they were made from the same files, else made now and kept.

    Args:
        kept: .npz file; where it cannot be written the arrays are made anew at every start.
        listing: digest of the files that `make` reads, see `listing_of`.
        make: the arrays by name.
    """
    found = _read(kept, listing)
    if found is not None:
        return found
    arrays = make()
    _keep(kept, arrays | {"listing": np.array(listing)})
    return arrays


def listing_of(paths: Sequence[Path], folder: Path, times: bool = False) -> str:
    """Digest of the files' names and sizes, and of when they were changed: another, another file.

    Args:
        paths: files below `folder`.
        folder: where names start.
        times: whether the time of the last change counts; a copy to elsewhere may change it.
    """
    lines = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths]
    if times:
        lines += [str(path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read(kept: Path, listing: str) -> Arrays | None:
    try:
        with np.load(kept, allow_pickle=False) as stored:
            if str(stored["listing"]) != listing:
                return None
            return {name: stored[name] for name in stored.files if name != "listing"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent, or cut short by a crash: made anew


def _keep(kept: Path, arrays: Arrays) -> None:
    """Writes the arrays under a temporary name first: another process never reads half a file."""
    draft = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(draft, kept)
    except OSError:  # not writable, or a full disk: the next start makes them again
        with suppress(OSError):
            draft.unlink()
