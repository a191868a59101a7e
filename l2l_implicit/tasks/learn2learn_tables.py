"""The images of CIFAR-FS, FC100, mini- and tiered-ImageNet, read by learn2learn's own classes.

Its benchmark functions are not used: without an option they leave mini-ImageNet at 0 to 255, keep
every image as float32, and write lists of labels into the root that outlive the data they list.
"""

import functools
import io
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learn2learn.vision.datasets import CIFARFS, FC100, MiniImagenet, TieredImagenet
from PIL import Image
from torch import Tensor

from l2l_implicit.tasks.image_table import ImageTable, LabelledData, LazyImages
from l2l_implicit.tasks.provide import Needed, damage_explained, provide, removed_if_interrupted

ZENODO = "https://zenodo.org/record/7978538/files"
SHORT = {"train": "train", "validation": "val", "test": "test"}
MINI = {mode: f"mini-imagenet-cache-{mode}.pkl" for mode in SHORT}
TIERED = [f"{short}_{kind}.pkl" for short in SHORT.values() for kind in ("images_png", "labels")]
NEEDED: dict[str, list[Needed]] = {
    "cifarfs": [Needed("cifarfs/cifar100", f"{ZENODO}/cifar100.zip", "cifar100.zip", "cifarfs")],
    "fc100": [
        Needed(f"FC100_{short}.pickle", f"{ZENODO}/fc100.zip", "fc100.zip")
        for short in SHORT.values()
    ],
    "mini_imagenet": [Needed(name, f"{ZENODO}/{name}") for name in MINI.values()],
    "tiered_imagenet": [
        Needed(f"tiered-imagenet/{name}", f"{ZENODO}/tiered-imagenet-{name}") for name in TIERED
    ],
}


class WholeCifarfs(CIFARFS):
    """learn2learn's, whose copy of the images by mode appears only once all of it is there.

    It copies when it first reads; the original takes half a copy for the whole ever after.
    """

    def _process_zip(self) -> None:
        final = Path(self.processed_root)
        self.processed_root: str = f"{final}.{os.getpid()}"
        try:
            super()._process_zip()
            with suppress(OSError):  # another process was quicker; if not, reading fails next
                os.replace(self.processed_root, final)
        finally:
            shutil.rmtree(self.processed_root, ignore_errors=True)
            self.processed_root = str(final)


def cifarfs(root: Path, mode: str) -> LabelledData:
    """100 classes of CIFAR-100, 600 images of 32 pixels each (Bertinetto et al. 2019)."""
    short = SHORT[mode]
    (unpacked,) = NEEDED["cifarfs"]
    copied = unpacked._replace(path=f"cifarfs/processed/{short}")
    if not (root / copied.path).is_dir():
        download = _downloader(CIFARFS, root, mode)
        leaves = ("cifarfs", "cifarfs/processed", "cifarfs.zip")
        provide("cifarfs", root, [unpacked], download, leaves)
    with damage_explained("cifarfs", root, [copied]):
        data = WholeCifarfs(root=str(root), mode=mode)
        _same_classes(root / "cifarfs/cifar100/splits/bertinetto" / f"{short}.txt", data.classes)
    return LazyImages(lambda index: _pixels(data[index][0]), data.targets, data.classes)


def fc100(root: Path, mode: str) -> LabelledData:
    """100 classes of CIFAR-100 split by superclass, 600 images of 32 pixels each (TADAM 2018)."""
    needed = NEEDED["fc100"]
    leaves = (*(item.path for item in needed), "fc100.zip")
    provide("fc100", root, needed, _downloader(FC100, root, mode), leaves)
    with damage_explained("fc100", root, [n for n in needed if SHORT[mode] in n.path]):
        data = FC100(root=str(root), mode=mode)
        labels, names = _consecutive(data.labels)
        return ImageTable(_channels_first(data.images), labels, names)


def mini_imagenet(root: Path, mode: str) -> LabelledData:
    """100 classes of ImageNet, 600 images of 84 pixels each (split of Ravi & Larochelle 2017)."""
    needed = NEEDED["mini_imagenet"]

    def download() -> None:  # file by file: what is complete stays when the next one fails
        for each, name in MINI.items():
            if not (root / name).exists():
                with removed_if_interrupted([root / name]):
                    MiniImagenet(root=str(root), mode=each, download=True)

    provide("mini_imagenet", root, needed, download)
    with damage_explained("mini_imagenet", root, [item for item in needed if mode in item.path]):
        data = MiniImagenet(root=str(root), mode=mode)
        # data.x holds the same images as float32, four times the memory: not kept.
        images = _channels_first(data.data["image_data"])
        return ImageTable(images, data.y.astype(int).tolist(), list(data.class_idx))


def tiered_imagenet(root: Path, mode: str) -> LabelledData:
    """608 classes of ImageNet split by category, 779,165 images of 84 pixels (Ren et al. 2018)."""
    needed = NEEDED["tiered_imagenet"]
    download = _downloader(TieredImagenet, root, mode)
    leaves = ("tiered-imagenet", *(item.path for item in needed), "tiered_imagenet.tar")
    provide("tiered_imagenet", root, needed, download, leaves)
    with damage_explained("tiered_imagenet", root, needed):
        data = TieredImagenet(root=str(root), mode=mode)
        labels, names = _consecutive(data.labels)
    # Not kept decoded: the encoded images are in memory already, 12 GB of them.
    return LazyImages(lambda index: _decoded(data.images[index]), labels, names, keep=False)


LOADERS: dict[str, Callable[[Path, str], LabelledData]] = {
    "cifarfs": cifarfs,
    "fc100": fc100,
    "mini_imagenet": mini_imagenet,
    "tiered_imagenet": tiered_imagenet,
}


def _downloader(kind: Any, root: Path, mode: str) -> Callable[[], Any]:
    return functools.partial(kind, root=str(root), mode=mode, download=True)


def _consecutive(labels: Iterable[Any]) -> tuple[list[int], list[str]]:
    """Labels 0, 1, ... in the order in which they first come, and what they were."""
    values = [int(label) for label in labels]
    position = {label: index for index, label in enumerate(dict.fromkeys(values))}
    return [position[label] for label in values], [str(label) for label in position]


def _same_classes(listed: Path, found: Sequence[str]) -> None:
    """An interrupted copy leaves classes out, and would never be noticed."""
    if listed.is_file() and sorted(listed.read_text().split()) != sorted(found):
        raise ValueError(f"{len(found)} classes where {listed} lists others")


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def _decoded(encoded: Any) -> Tensor:
    with Image.open(io.BytesIO(encoded)) as picture:
        return _pixels(picture)
