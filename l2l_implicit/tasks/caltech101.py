"""Caltech 101 as a few-shot data set: 100 categories of photographs, squared and reduced.

Li, Andreeto, Ranzato, Perona: Caltech 101, CaltechDATA, 2022, doi 10.22002/D1.20086, CC BY 4.0.
"""

from pathlib import Path
from typing import Any

import torch

from l2l_implicit.tasks.caltech101_files import fetch, images_of, split_folder
from l2l_implicit.tasks.caltech101_split import SPLIT
from l2l_implicit.tasks.image_table import ImageTable
from l2l_implicit.tasks.tasksets import (
    MODES,
    Benchmark,
    build_tasksets,
    check_name,
    refuse_unknown,
)

# By channel, of the images of the training categories in [0, 1] (measured at 32 x 32).
MEAN = (0.535, 0.519, 0.490)
STD = (0.281, 0.276, 0.291)


class Caltech101(ImageTable):
    """Photographs of 100 object categories; an item is (float32 [3, size, size], int label).

    Each photograph is cropped to its central square, reduced to size x size, scaled to [0, 1] and
    normalised with `MEAN` and `STD`. The reduced images are kept beside the originals, so that the
    next start reads one file; where that folder is not writable they are made anew every time.

    Args:
        mode: "train" (64 categories), "validation" (16) or "test" (20).
        root: folder that holds `caltech101/101_ObjectCategories/<category>/*.jpg`.
        size: side of the images in pixels.
        device: where the images live, None for the CPU.

    Raises:
        ValueError: an unknown mode or a size below 1.
        FileNotFoundError: the folder, or the folder of a category, is missing or empty.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from l2l_implicit.tasks import Caltech101
        >>> from l2l_implicit.tasks.caltech101_split import SPLIT
        >>> root = tempfile.TemporaryDirectory()
        >>> for category in SPLIT["validation"]:
        ...     folder = Path(root.name) / "caltech101" / "101_ObjectCategories" / category
        ...     folder.mkdir(parents=True)
        ...     for number in (1, 2):
        ...         Image.new("RGB", (40, 30)).save(folder / f"image_000{number}.jpg")
        >>> photographs = Caltech101("validation", root.name)
        >>> len(photographs), photographs[0][0].shape
        (32, torch.Size([3, 32, 32]))
    """

    def __init__(
        self,
        mode: str = "train",
        root: str | Path = "~/data",
        size: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        check_name("mode", mode, MODES)
        if size < 1:
            raise ValueError(f"expected a size of at least 1 pixel, got {size}: pass e.g. 32")
        folder = split_folder(Path(root).expanduser(), SPLIT[mode])
        images, labels = images_of(folder, SPLIT[mode], size, mode)
        super().__init__(torch.from_numpy(images), labels.tolist(), SPLIT[mode], MEAN, STD, device)


def caltech101_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str | Path | None = "~/data",
    device: torch.device | str | None = None,
    size: int = 32,
    **kwargs: Any,
) -> Benchmark:
    """(datasets, transforms) of Caltech 101, as learn2learn's own benchmarks return them.

    Args:
        train_ways, test_ways: classes of a task (test: also of validation tasks).
        train_samples, test_samples: images of a class in a task, shots plus queries.
        root: see `Caltech101`; None means "~/data".
        device: where the images live, None for the CPU.
        size: side of the images in pixels.
        kwargs: nothing else; `data_augmentation=None` is accepted as learn2learn's callers pass it.

    Raises:
        ValueError: more ways or samples than there are.
        FileNotFoundError: the images are not there, and cannot be downloaded.
        TypeError: an unknown option.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from l2l_implicit.tasks import get_tasksets
        >>> from l2l_implicit.tasks.caltech101_split import SPLIT
        >>> root = tempfile.TemporaryDirectory()
        >>> for category in sum(map(list, SPLIT.values()), []):
        ...     folder = Path(root.name) / "caltech101" / "101_ObjectCategories" / category
        ...     folder.mkdir(parents=True)
        ...     for number in (1, 2):
        ...         Image.new("RGB", (40, 30)).save(folder / f"image_000{number}.jpg")
        >>> tasks = get_tasksets("caltech101", root=root.name, train_samples=2, test_samples=2)
        >>> images, labels = tasks.train.sample()
        >>> images.shape
        torch.Size([10, 3, 32, 32])
    """
    refuse_unknown(kwargs, own=("size",))
    folder = Path(root or "~/data").expanduser()
    fetch(folder)
    tables = {mode: Caltech101(mode, folder, size, device) for mode in MODES}
    return build_tasksets(tables, train_ways, train_samples, test_ways, test_samples)
