"""The user's own images as few-shot tasks: a folder of classes, or three of them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l2l_implicit.tasks.folder_files import Pictures, modes_of, read_pictures, shared_names
from l2l_implicit.tasks.image_table import ImageTable
from l2l_implicit.tasks.tasksets import Benchmark, build_tasksets, refuse_unknown


class FolderImages(ImageTable):
    """The user's images of one mode; an item is (float32 [1 or 3, size, size], int label).

    Attributes:
        skipped: how many files of the whole folder could not be read.

    Example:
        Made by `folder_tables`, one for each mode.

        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from l2l_implicit.tasks import folder_tables
        >>> root = tempfile.TemporaryDirectory()
        >>> for number in range(12):
        ...     folder = Path(root.name) / f"class {number}"
        ...     folder.mkdir()
        ...     for image in range(3):
        ...         Image.new("RGB", (40, 30), (20 * number, 50 * image, 0)).save(
        ...             folder / f"{image}.png")
        >>> images = folder_tables(root.name, size=16)["train"]
        >>> len(images), images.skipped, images[0][0].shape
        (24, 0, torch.Size([3, 16, 16]))
    """

    skipped = 0


def folder_tables(
    root: str | Path,
    size: int = 32,
    split_seed: int | None = None,
    skip_unreadable: bool = False,
    device: torch.device | str | None = None,
) -> dict[str, FolderImages]:
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
        skip_unreadable: leave out, count and warn of files that are no pictures.
        device: where the images live, None for the CPU.

    Raises:
        FileNotFoundError: no folder, or no class in it.
        ValueError: an incomplete layout, a size below 1, or files that cannot be read.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from l2l_implicit.tasks import folder_tables
        >>> root = tempfile.TemporaryDirectory()
        >>> for number in range(12):
        ...     folder = Path(root.name) / f"class {number}"
        ...     folder.mkdir()
        ...     for image in range(3):
        ...         Image.new("RGB", (40, 30), (20 * number, 50 * image, 0)).save(
        ...             folder / f"{image}.png")
        >>> {mode: len(table.classes) for mode, table in folder_tables(root.name).items()}
        {'train': 8, 'validation': 2, 'test': 2}
    """
    if size < 1:
        raise ValueError(f"expected a size of at least 1 pixel, got {size}: pass e.g. 32")
    folder = Path(root).expanduser()
    modes, seed = modes_of(folder, split_seed)
    shared = shared_names(modes)
    if shared:
        warnings.warn(
            f"folder: {len(shared)} classes have one name in two of train, validation and test "
            f"({shared[0]}): are they different things?",
            stacklevel=2,
        )
    files = [
        (mode, name, path)
        for mode, classes in modes.items()
        for name, paths in classes.items()
        for path in paths
    ]
    pictures = read_pictures([path for _, _, path in files], folder, size)
    readable = _readable(pictures, skip_unreadable)
    members = {mode: [i for i in readable if files[i][0] == mode] for mode in modes}
    channels = 1 if pictures.grey[readable].all() else 3
    mean, std = _statistics(pictures.images[members["train"], :channels], folder)
    tables = {}
    for mode, indices in members.items():
        names = list(modes[mode])
        tables[mode] = FolderImages(
            torch.from_numpy(pictures.images[indices, :channels]),
            [names.index(files[i][1]) for i in indices],
            names,
            mean,
            std,
            device,
        )
        tables[mode].skipped = len(files) - len(readable)
        tables[mode].notes = {
            "classes": names,
            "skipped": tables[mode].skipped,
            "split_seed": seed,
        }
    return tables


def folder_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str | Path | None = "~/data",
    device: torch.device | str | None = None,
    size: int = 32,
    split_seed: int | None = None,
    skip_unreadable: bool = False,
    **kwargs: Any,
) -> Benchmark:
    """(datasets, transforms) of a folder of images, as learn2learn's own benchmarks return them.

    Args:
        train_ways, test_ways: classes of a task (test: also of validation tasks).
        train_samples, test_samples: images of a class in a task, shots plus queries.
        root, device, size, split_seed, skip_unreadable: see `folder_tables`.
        kwargs: nothing else; `data_augmentation=None` is accepted as learn2learn's callers pass it.

    Raises:
        ValueError, FileNotFoundError: see `folder_tables`; more ways or samples than there are.
        TypeError: an unknown option.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from l2l_implicit.tasks import get_tasksets
        >>> root = tempfile.TemporaryDirectory()
        >>> for number in range(12):
        ...     folder = Path(root.name) / f"class {number}"
        ...     folder.mkdir()
        ...     for image in range(3):
        ...         Image.new("RGB", (40, 30), (20 * number, 50 * image, 0)).save(
        ...             folder / f"{image}.png")
        >>> tasks = get_tasksets("folder", root=root.name, train_ways=2, train_samples=3,
        ...                      test_ways=2, test_samples=3)
        >>> images, labels = tasks.train.sample()
        >>> images.shape
        torch.Size([6, 3, 32, 32])
    """
    refuse_unknown(kwargs, own=("size", "split_seed", "skip_unreadable"))
    tables = folder_tables(root or "~/data", size, split_seed, skip_unreadable, device)
    return build_tasksets(tables, train_ways, train_samples, test_ways, test_samples)


def _readable(pictures: Pictures, skip_unreadable: bool) -> list[int]:
    """Indices of the files that were read."""
    faults = [fault for fault in pictures.faults if fault]
    if faults and not skip_unreadable:
        others = f" ({len(faults)} such files)" if len(faults) > 1 else ""
        raise ValueError(faults[0] + others)
    if faults:
        warnings.warn(
            f"folder: skipped {len(faults)} of {len(pictures.faults)} files that cannot be read; "
            f"the first: {faults[0]}",
            stacklevel=3,
        )
    return [index for index, fault in enumerate(pictures.faults) if not fault]


def _statistics(images: NDArray[np.uint8], folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation by channel, in [0, 1]; from the counts of the 256 levels."""
    if not images.size:
        raise ValueError(
            f"expected images to train with in {folder}, got none: add images to the classes"
        )
    levels, means, stds = np.arange(256) / 255, [], []
    for channel in range(images.shape[1]):
        share = _counts(images[:, channel]) / images[:, channel].size
        mean = float(share @ levels)
        means.append(mean)
        stds.append(float(share @ (levels - mean) ** 2) ** 0.5 or 1.0)  # one colour: only shifted
    return means, stds


def _counts(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each level occurs; a thousand images at a time, as bincount widens them."""
    parts = np.array_split(images, len(images) // 1000 + 1)
    return np.sum([np.bincount(part.ravel(), minlength=256) for part in parts], axis=0)
