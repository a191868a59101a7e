"""Caltech 101 on disk: finds the photographs, reduces them, and keeps the result for next time."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [n, 3, size, size], labels [n]

SOURCE = (
    "get caltech-101.zip of Caltech 101 (CaltechDATA, doi 10.22002/D1.20086, CC BY 4.0) and unpack "
    "its 101_ObjectCategories.tar.gz there, or run torchvision.datasets.Caltech101(root, "
    "download=True) with this root"
)


def split_folder(root: Path, categories: Sequence[str]) -> Path:
    """`root/caltech101/101_ObjectCategories`, once every category is known to have photographs.

    Raises:
        FileNotFoundError: the folder is missing, or a category has no .jpg file in it.
    """
    folder = root / "caltech101" / "101_ObjectCategories"
    if not folder.is_dir():
        raise FileNotFoundError(f"expected the photographs in {folder}, found no folder: {SOURCE}")
    empty = [name for name in categories if next((folder / name).glob("*.jpg"), None) is None]
    if empty:
        raise FileNotFoundError(
            f"expected .jpg files for each of {len(categories)} categories in {folder}, found none "
            f"for {', '.join(empty[:3])}{' and others' * (len(empty) > 3)}: {SOURCE}"
        )
    return folder


def images_of(folder: Path, categories: Sequence[str], size: int, mode: str) -> Arrays:
    """The reduced photographs of these categories, from the file of an earlier call if it fits."""
    paths = [path for name in categories for path in sorted((folder / name).glob("*.jpg"))]
    listing = _listing(paths, folder)
    kept = folder.with_name(f"reduced_{mode}_{size}.npz")
    found = _read(kept, listing)
    if found is not None:
        return found
    position = {name: label for label, name in enumerate(categories)}
    images = np.stack([reduce_photograph(path, size) for path in paths])
    labels = np.array([position[path.parent.name] for path in paths], np.int64)
    _keep(kept, images=images, labels=labels, listing=np.array(listing))
    return images, labels


def reduce_photograph(path: Path, size: int) -> NDArray[np.uint8]:
    """The central square of a photograph, bilinearly reduced: uint8 RGB [3, size, size]."""
    with Image.open(path) as photograph:
        side = min(photograph.size)
        left, top = ((length - side) // 2 for length in photograph.size)
        square = (left, top, left + side, top + side)
        # Cropped first: resize(box=...) would mix in pixels from outside the square.
        central = photograph.convert("RGB").crop(square)
    reduced = central.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(reduced).transpose(2, 0, 1).copy()


def _listing(paths: Sequence[Path], folder: Path) -> str:
    """Digest of names and sizes: a kept file made from other photographs does not fit."""
    lines = (f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read(kept: Path, listing: str) -> Arrays | None:
    try:
        with np.load(kept, allow_pickle=False) as stored:
            if str(stored["listing"]) != listing:
                return None
            return stored["images"], stored["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent, or cut short by a crash: it is made anew from the photographs


def _keep(kept: Path, **arrays: NDArray) -> None:
    """Writes the arrays under a temporary name first: another process never reads half a file."""
    draft = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(draft, kept)
    except OSError:  # not writable, or a full disk: the next start reduces the photographs again
        with suppress(OSError):
            draft.unlink()
