"""The user's own images on disk: which classes there are, and their pictures."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from l2l_implicit.tasks.kept_arrays import Arrays, kept_arrays, listing_of
from l2l_implicit.tasks.read_image import read_square
from l2l_implicit.tasks.tasksets import MODES

Classes = dict[str, list[Path]]  # the files of each class by its name
SHARES = (0.16, 0.20)  # of the classes, for validation and test; training has the others


class Pictures(NamedTuple):
    """Pictures of some files: uint8 [n, 3, size, size], by file whether it is grey or unreadable.

    Attributes:
        images: black where the file could not be read.
        grey: bool [n].
        faults: n messages, empty where the file was read.
    """

    images: NDArray[np.uint8]
    grey: NDArray[np.bool_]
    faults: list[str]


def modes_of(root: Path, split_seed: int | None) -> tuple[dict[str, Classes], int | None]:
    """The classes of each mode, and the seed with which they were drawn, None if they were not.

    Args:
        root: holds `train`, `validation` and `test` with folders of classes, or the classes.
        split_seed: for one folder of classes, None means 0.

    Raises:
        FileNotFoundError: no such folder, or no class in it.
        ValueError: of train, validation and test some are there; a seed where all are.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"expected a folder of images at {root}, found none: pass root= the folder that holds "
            "train, validation and test, or one folder for each class"
        )
    found = [mode for mode in MODES if _folders(root / mode)]
    if not found:
        seed = split_seed or 0
        return split_classes(_classes(root), seed), seed
    if len(found) < len(MODES):
        names = ", ".join(path.name for path in _folders(root))
        raise ValueError(
            f"expected folders of classes in each of train, validation and test of {root}, found "
            f"{names}: name all three so, or put all classes into one folder for a split by seed"
        )
    if split_seed is not None:
        raise ValueError(
            f"expected no split_seed where {root} has train, validation and test, got "
            f"{split_seed}: leave it out, or pass one folder that holds all classes"
        )
    return {mode: _classes(root / mode) for mode in MODES}, None


def split_classes(classes: Classes, split_seed: int) -> dict[str, Classes]:
    """64 / 16 / 20 % of the classes for train, validation and test, rounded, drawn with a seed."""
    names = sorted(classes)
    random.Random(split_seed).shuffle(names)
    validation, test = (round(share * len(names)) for share in SHARES)
    train = len(names) - validation - test
    parts = names[:train], names[train : train + validation], names[train + validation :]
    return {
        mode: {name: classes[name] for name in sorted(part)}
        for mode, part in zip(MODES, parts, strict=True)
    }


def shared_names(modes: Mapping[str, Classes]) -> list[str]:
    """Names of classes that more than one mode has."""
    names = [name for classes in modes.values() for name in classes]
    return sorted({name for name in names if names.count(name) > 1})


def read_pictures(paths: Sequence[Path], root: Path, size: int) -> Pictures:
    """The pictures of these files, kept in the root for the next start.

    Args:
        paths: files below the root.
        root: of the data set.
        size: side of the pictures in pixels.
    """
    kept = root / f".reduced_{size}.npz"  # hidden: no class, whatever layout the folder has
    listing = f"{root.resolve()} {listing_of(paths, root, times=True)}"  # faults name the root
    arrays = kept_arrays(kept, listing, lambda: _read(paths, size))
    return Pictures(arrays["images"], arrays["grey"], [str(fault) for fault in arrays["faults"]])


def _read(paths: Sequence[Path], size: int) -> Arrays:
    images = np.zeros((len(paths), 3, size, size), np.uint8)
    grey, faults = np.ones(len(paths), bool), [""] * len(paths)
    for index, path in enumerate(paths):
        try:
            images[index], grey[index] = read_square(path, size)
        except ValueError as error:
            faults[index] = str(error)
    return {"images": images, "grey": grey, "faults": np.array(faults, dtype=np.str_)}


def _classes(folder: Path) -> Classes:
    """Every folder is a class, every file in it a picture; hidden ones are neither."""
    classes = {path.name: _files(path) for path in _folders(folder)}
    if not classes:
        raise FileNotFoundError(
            f"expected one folder for each class in {folder}, found none: put images of a class "
            "into a folder of its name"
        )
    return classes


def _files(folder: Path) -> list[Path]:
    entries = _visible(folder)
    nested = [path for path in entries if path.is_dir()]
    if nested:
        raise ValueError(
            f"expected only images in the folder of a class, found the folder {nested[0]}: move "
            "its images up, or let root be the folder that holds the classes"
        )
    return entries


def _folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()] if folder.is_dir() else []


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
