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

import torch
from learn2learn.vision.datasets import FullOmniglot
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from torchvision.datasets import Omniglot
from torchvision.transforms.functional import pil_to_tensor

from l2l_implicit.tasks.image_table import Device, ImageTable
from l2l_implicit.tasks.pictures import opened
from l2l_implicit.tasks.provide import Needed, damage_explained, provide
from l2l_implicit.tasks.tasksets import draw_modes

SIDE = 28
SHARES = (100 / 1623, 423 / 1623)  # of the characters, for validation and test
NEEDED = tuple(
    Needed(
        f"{Omniglot.folder}/{part}",
        f"{Omniglot.download_url_prefix}/{part}.zip",
        f"{Omniglot.folder}/{part}.zip",
        Omniglot.folder,
    )
    for part in ("images_background", "images_evaluation")
)


class UnpackedOmniglot(Omniglot):
    """torchvision's, content with the unpacked folder; a drawing that cannot be read is named.

    The original insists on the archive and its checksum, and downloads again what lacks only that.
    """

    def _check_integrity(self) -> bool:
        return (Path(self.root) / self._get_target_folder()).is_dir()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, character = self._flat_character_images[index]
        with opened(Path(self.target_folder, self._characters[character], name)) as drawing:
            return _small(drawing.convert("L")), character


def rotate_classes(dataset: Any, description: Any) -> Any:
    """A task transform: every class of a task turned by 0, 90, 180 or 270 degrees.

    Drawn from Python's `random`, one number for each class in the order in which classes come;
    `dataset` is a `learn2learn.data.MetaDataset`.
    """
    turns: dict[int, int] = {}
    for sample in description:
        label = dataset.indices_to_labels[sample.index]
        if label not in turns:
            turns[label] = random.randrange(4)
        sample.transforms.append(functools.partial(_turned, turns=turns[label]))
    return description


def _turned(item: Any, turns: int) -> tuple[Tensor, Any]:
    return torch.rot90(item[0], turns, dims=(-2, -1)), item[1]


def omniglot_tables(root: Path, split_seed: int, device: Device = None) -> dict[str, ImageTable]:
    """The characters of each mode: 1,100 / 100 / 423 of them, drawn with a seed.

    Strokes are white on black. Fewer characters (part of the data) are split in this proportion.
    With a device all images are read and moved there at once.
    """
    leaves = [path for item in NEEDED for path in (item.path, str(item.archive))]
    download = functools.partial(FullOmniglot, str(root), download=True)
    provide("omniglot", root, NEEDED, download, leaves)
    with damage_explained("omniglot", root, NEEDED):
        parts = [UnpackedOmniglot(str(root), flag) for flag in (True, False)]
    names = [name for part in parts for name in part._characters]
    indices = iter(range(sum(map(len, parts))))
    members = [  # of each character, among the drawings of both parts
        [next(indices) for _ in images] for part in parts for images in part._character_images
    ]
    drawings: ConcatDataset[tuple[Tensor, int]] = ConcatDataset(parts)
    tables = {}
    for mode, chosen in draw_modes(range(len(names)), SHARES, split_seed).items():
        drawn = Subset(drawings, [index for label in chosen for index in members[label]])
        labels = [new for new, label in enumerate(chosen) for _ in members[label]]
        tables[mode] = ImageTable(drawn, labels, [names[label] for label in chosen], device=device)
        tables[mode].notes = {"split_seed": split_seed}
    return tables


def _small(drawing: Image.Image) -> Tensor:
    return 255 - pil_to_tensor(drawing.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
