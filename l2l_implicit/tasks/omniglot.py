"""Omniglot as learn2learn's benchmark has it: 1,623 characters at 28 pixels, rotated by class.

Lake, Salakhutdinov, Tenenbaum: Human-level concept learning through probabilistic program
induction, Science 2015. What differs from `learn2learn.vision.benchmarks` 0.2.0: there tasks of
every mode are drawn from all 1,623 classes, the split depends on the global `random`, all classes
of a task get the rotation of the last one, and `device` is ignored.
"""

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import Omniglot

from l2l_implicit.tasks.image_table import LazyImages
from l2l_implicit.tasks.provide import Needed, damage_explained, provide
from l2l_implicit.tasks.tasksets import MODES

SIDE = 28
TRAIN, VALIDATION, ALL = 1100, 100, 1623
PARTS = ("images_background", "images_evaluation")
NEEDED = tuple(
    Needed(
        f"{Omniglot.folder}/{part}",
        f"https://raw.githubusercontent.com/brendenlake/omniglot/master/python/{part}.zip",
        f"{Omniglot.folder}/{part}.zip",
        Omniglot.folder,
    )
    for part in PARTS
)


class UnpackedOmniglot(Omniglot):
    """torchvision's, content with the unpacked folder.

    The original insists on the archive and its checksum, and downloads again what lacks only that.
    """

    def _check_integrity(self) -> bool:
        return (Path(self.root) / self._get_target_folder()).is_dir()


class RotateClasses:
    """A task transform: every class of a task turned by 0, 90, 180 or 270 degrees.

    Drawn from Python's `random`, one number for each class in the order in which classes come.

    Args:
        dataset: a `learn2learn.data.MetaDataset`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, description: Any) -> Any:
        turns: dict[int, int] = {}
        for sample in description:
            label = self.dataset.indices_to_labels[sample.index]
            if label not in turns:
                turns[label] = random.randrange(4)
            sample.transforms.append(functools.partial(_turned, turns=turns[label]))
        return description


def _turned(item: Any, turns: int) -> tuple[Tensor, Any]:
    return torch.rot90(item[0], turns, dims=(-2, -1)), item[1]


def omniglot_tables(root: Path, split_seed: int = 0) -> dict[str, LazyImages]:
    """The characters of each mode: 1,100 / 100 / 423 of them, drawn with a seed.

    Strokes are white on black. Fewer characters (part of the data) are split in this proportion.

    Args:
        root: holds `omniglot-py/images_background` and `images_evaluation`, or their archives.
        split_seed: of the split into modes.

    Raises:
        FileNotFoundError: not there, and not to be downloaded.
        ValueError: damaged.
    """
    leaves = [path for item in NEEDED for path in (item.path, str(item.archive))]
    provide("omniglot", root, NEEDED, functools.partial(_download, root), leaves)
    with damage_explained("omniglot", root, NEEDED):
        parts = [UnpackedOmniglot(str(root), background=flag) for flag in (True, False)]
    names = [name for part in parts for name in part._characters]
    offsets = (0, len(parts[0]._characters))  # both parts count their characters from 0
    samples = [
        (part, index, label + offset)
        for part, offset in zip(parts, offsets, strict=True)
        for index, (_, label) in enumerate(part._flat_character_images)
    ]
    by_label: dict[int, list[tuple[Omniglot, int]]] = {}
    for part, index, label in samples:
        by_label.setdefault(label, []).append((part, index))
    tables = {
        mode: _table([by_label.get(label, []) for label in labels], [names[x] for x in labels])
        for mode, labels in split_labels(len(names), split_seed).items()
    }
    for table in tables.values():
        table.notes = {"split_seed": split_seed}
    return tables


def split_labels(number: int, split_seed: int) -> dict[str, list[int]]:
    """Labels 0 to number - 1 by mode, in the proportion 1,100 / 100 / 423, drawn with a seed."""
    labels = list(range(number))
    random.Random(split_seed).shuffle(labels)
    first, second = (round(number * end / ALL) for end in (TRAIN, TRAIN + VALIDATION))
    parts = labels[:first], labels[first:second], labels[second:]
    return dict(zip(MODES, parts, strict=True))


def _table(classes: list[list[tuple[Omniglot, int]]], names: list[str]) -> LazyImages:
    flat = [sample for samples in classes for sample in samples]
    labels = [label for label, samples in enumerate(classes) for _ in samples]
    return LazyImages(functools.partial(_read, flat), labels, names)


def _read(samples: list[tuple[Omniglot, int]], index: int) -> Tensor:
    part, position = samples[index]
    drawing = part[position][0].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(255 - np.asarray(drawing, np.uint8)).unsqueeze(0)


def _download(root: Path) -> None:
    for background in (True, False):
        Omniglot(str(root), background=background, download=True)
