"""The user's own images as few-shot tasks: a folder of classes, or three of them."""

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.checks import printable
from l2l_implicit.tasks.image_table import Device, ImageTable
from l2l_implicit.tasks.pictures import FORMATS, Arrays, kept_arrays, listing_of, read_square
from l2l_implicit.tasks.tasksets import MODES, Benchmark, build_tasksets, draw_modes, refuse_unknown

Classes = dict[str, list[Path]]  # the files of each class by its name
SHARES = (0.16, 0.20)  # of the classes, for validation and test; training has the others


class FolderImages(ImageTable):
    """The images of one mode, by `folder_tables`; an item is (float32 [1 or 3, size, size], int).

    Attributes:
        skipped: how many files of the whole folder could not be read.

    Example:
        >>> import torch, l2l_implicit.tasks as tasks
        >>> images = tasks.FolderImages(torch.zeros(2, 3, 9, 9, dtype=torch.uint8), [0, 0], ["cat"])
        >>> len(images), images.skipped, images[0][0].shape
        (2, 0, torch.Size([3, 9, 9]))
    """

    skipped = 0


def folder_tables(
    root: str | Path, size: int = 32, split_seed: int | None = None,
    skip_unreadable: bool = False, device: Device = None,
) -> dict[str, FolderImages]:  # fmt: skip
    """Train, validation and test images of a folder.

    The layout is `root/{train,validation,test}/<class>/*`, or `root/<class>/*` with a split of the
    classes by seed (64 / 16 / 20 %, rounded). Each picture is turned as its EXIF orientation says,
    cropped to its central square and resized; transparency becomes white. If all pictures are grey
    there is one channel, otherwise three. Normalised with mean and standard deviation, by channel,
    of the training images. The reduced pictures are kept in the root for the next start.

    Args:
        root: the folder.
        size: side of the images in pixels.
        split_seed: of the split into modes, None means 0; only for one folder of classes.
        skip_unreadable: leave out, count and warn of what is in a class and is no picture.
        device: where the images live, None for the CPU.

    Raises:
        FileNotFoundError: no folder, or no class in it.
        ValueError, TypeError: an incomplete layout, a size below 1 or no whole number, files that
            cannot be read.

    Example:
        >>> import pathlib, tempfile, PIL.Image
        >>> from l2l_implicit.tasks import folder_tables
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in "abcdefghijkl":
        ...         pathlib.Path(root, name).mkdir()
        ...         PIL.Image.new("RGB", (40, 30)).save(pathlib.Path(root, name, "0.png"))
        ...     [len(table.classes) for table in folder_tables(root).values()]
        [8, 2, 2]
    """
    checks.count("size", size)
    folder = Path(root).expanduser()
    try:
        modes, seed = modes_of(folder, split_seed)
    except OSError as error:
        if error.filename is None:  # of ours
            raise
        raise ValueError(
            f"expected folders of images in {printable(folder)}, got {printable(error.filename)} "
            f"({error.strerror}): mend or remove it"
        ) from error
    uses = Counter(unicodedata.normalize("NFC", name.casefold())
                   for classes in modes.values() for name in classes)  # fmt: skip
    if shared := sorted(name for name in uses if uses[name] > 1):
        warnings.warn(
            f"folder: {len(shared)} classes have one name in two of train, validation and test, or "
            f"in two spellings ({printable(shared[0])}): are they different things?",
            stacklevel=2,
        )
    real = Counter(paths[0].parent.resolve() for classes in modes.values()
                   for paths in classes.values() if paths)  # fmt: skip
    if twice := [path for path in real if real[path] > 1]:
        raise ValueError(
            f"expected every class once, got {printable(twice[0])} under two names: remove the link"
        )
    files = [
        (mode, label, path)
        for mode, classes in modes.items()
        for label, paths in enumerate(classes.values())
        for path in paths
    ]
    pictures = _pictures([path for _, _, path in files], folder, size)
    readable = _readable(str(pictures["faults"]).split("\n")[: len(files)], skip_unreadable)
    channels = 1 if pictures["grey"][readable].all() else 3
    images = torch.from_numpy(pictures["images"])[:, :channels]
    members = {mode: [i for i in readable if files[i][0] == mode] for mode in modes}
    mean, std = _statistics(images[members["train"]], folder)
    tables, skipped = {}, len(files) - len(readable)
    digest = listing_of([path for _, _, path in files], folder)[:16]
    for mode, indices in members.items():
        labels, names = [files[i][1] for i in indices], list(modes[mode])
        tables[mode] = FolderImages(images[indices], labels, names, mean, std, device)
        tables[mode].skipped = skipped
        tables[mode].notes = {"classes": [*map(printable, names)], "skipped": skipped,
                              "split_seed": seed, "files": digest}  # fmt: skip
    return tables


def folder_tasksets(
    train_ways: int = 5, train_samples: int = 10, test_ways: int = 5, test_samples: int = 10,
    root: str | Path | None = "~/data", device: Device = None, size: int = 32,
    split_seed: int | None = None, skip_unreadable: bool = False, **kwargs: Any,
) -> Benchmark:  # fmt: skip
    """(datasets, transforms) of a folder of images, as learn2learn's own benchmarks return them.

    Args:
        train_ways, train_samples, test_ways, test_samples, kwargs: see `get_tasksets`.
        root, device, size, split_seed, skip_unreadable: see `folder_tables`.

    Example:
        >>> import pathlib, tempfile, PIL.Image
        >>> from l2l_implicit.tasks import get_tasksets
        >>> root = tempfile.TemporaryDirectory()
        >>> for name in "abcdefghijkl":
        ...     pathlib.Path(root.name, name).mkdir()
        ...     PIL.Image.new("RGB", (40, 30), "red").save(pathlib.Path(root.name, name, "0.png"))
        >>> tasks = get_tasksets("folder", root=root.name, train_ways=2, train_samples=1,
        ...                      test_ways=2, test_samples=1)
        >>> tasks.train.sample()[0].shape
        torch.Size([2, 3, 32, 32])
    """
    refuse_unknown(kwargs, own=("size", "split_seed", "skip_unreadable"))
    tables = folder_tables(root or "~/data", size, split_seed, skip_unreadable, device)
    return build_tasksets(tables, train_ways, train_samples, test_ways, test_samples)


def modes_of(root: Path, split_seed: int | None) -> tuple[dict[str, Classes], int | None]:
    """The classes of each mode, and the seed with which they were drawn, None if they were not."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"expected a folder of images at {printable(root)}, found none: pass root= the folder "
            "that holds train, validation and test, or one folder for each class"
        )
    found = [mode for mode in MODES if (root / mode).is_dir() and _folders(root / mode)]
    if not found:
        seed = split_seed or 0
        classes = _classes(root)
        drawn = draw_modes(sorted(classes), SHARES, seed)
        parts = {mode: {name: classes[name] for name in sorted(drawn[mode])} for mode in MODES}
        return parts, seed
    if len(found) < len(MODES):
        names = ", ".join(printable(path.name) for path in _folders(root))
        raise ValueError(
            f"expected folders of classes in each of train, validation and test of "
            f"{printable(root)}, found {names}: name all three so, or put all classes into one "
            "folder for a split by seed"
        )
    if split_seed is not None:
        raise ValueError(
            f"expected no split_seed where {printable(root)} has train, validation and test, got "
            f"{split_seed}: leave it out, or pass one folder that holds all classes"
        )
    _tell_unread([path for path in _folders(root) if path.name not in MODES])
    return {mode: _classes(root / mode) for mode in MODES}, None


def _classes(folder: Path) -> Classes:
    """Every folder is a class, every file in it a picture; hidden ones are neither."""
    classes = {path.name: _visible(path) for path in _folders(folder)}
    _tell_unread([path for path in _visible(folder) if path.name not in classes
                  and Image.EXTENSION.get(path.suffix.lower()) in FORMATS])  # fmt: skip
    if not classes:
        raise FileNotFoundError(
            f"expected one folder for each class in {printable(folder)}, found none: put images of "
            "a class into a folder of its name"
        )
    return classes


def _tell_unread(paths: Sequence[Path]) -> None:
    if paths:
        told = f"folder: {len(paths)} entries are in no class; not read: {printable(paths[0])}"
        warnings.warn(told, stacklevel=4)


def _folders(folder: Path) -> list[Path]:
    """Also a link that leads to none: the class is missed when it is read."""
    return [p for p in _visible(folder) if p.is_dir() or (p.is_symlink() and not p.exists())]


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _pictures(paths: Sequence[Path], root: Path, size: int) -> Arrays:
    """`images` uint8 [n, 3, size, size], which are `grey`, and `faults`: a line a file, or none."""

    def make() -> Arrays:
        images = np.zeros((len(paths), 3, size, size), np.uint8)
        grey, faults = np.ones(len(paths), bool), [""] * len(paths)
        for index, path in enumerate(paths):
            try:
                if os.path.isdir(path):  # False where one may not look
                    raise ValueError(
                        f"expected only images in the folder of a class, found the folder "
                        f"{printable(path)}: move its images up, or let root be the folder that "
                        "holds the classes"
                    )
                images[index], grey[index] = read_square(path, size)
            except ValueError as error:
                faults[index] = str(error)
        return {"images": images, "grey": grey, "faults": np.array("\n".join(faults))}

    kept = root / f".reduced_{size}.npz"  # hidden: no class, whatever layout the folder has
    listing = f"4 {printable(root.resolve())} {listing_of(paths, root, times=True)}"
    return kept_arrays(kept, listing, make)


def _readable(faults: Sequence[str], skip_unreadable: bool) -> list[int]:
    """Indices of the files that were read."""
    told = [fault for fault in faults if fault]
    if told and not skip_unreadable:
        number = f" ({len(told)} such files)" if len(told) > 1 else ""
        raise ValueError(f"{told[0]}, or pass skip_unreadable=True{number}")
    if told:
        warnings.warn(
            f"folder: skipped {len(told)} of {len(faults)} files that cannot be read; the first: "
            f"{told[0]}",
            stacklevel=3,
        )
    return [index for index, fault in enumerate(faults) if not fault]


def _statistics(images: Tensor, folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, in [0, 1]; from the counts of the 256 levels."""
    if not len(images):
        raise ValueError(
            f"expected images to train with in {printable(folder)}, got none: add images to the "
            "classes"
        )
    levels, means, stds = np.arange(256) / 255, [], []
    for channel in images.transpose(0, 1):
        share = channel.flatten().bincount(minlength=256).numpy() / channel.numel()
        means.append(float(share @ levels))
        deviation = float(share @ (levels - means[-1]) ** 2) ** 0.5
        stds.append(deviation or 1.0)  # one colour: only shifted
    return means, stds
