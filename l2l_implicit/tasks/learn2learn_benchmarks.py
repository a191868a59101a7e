"""Learn2learn's five benchmarks as task sets, with the defects of its release 0.2.0 routed round.

The images come from learn2learn's and torchvision's own classes, and the task transforms are
learn2learn's. Its benchmark functions are not used: without an option they leave mini-ImageNet at
0 to 255, keep every image as float32, and write lists of labels into the root that outlive the
data they list. See `docs/tasks.md` for what each file is and where it belongs.
"""

import operator
import os
import pickle
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from learn2learn.vision.datasets import CIFARFS, FC100, MiniImagenet, TieredImagenet
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from l2l_implicit import checks
from l2l_implicit.tasks import omniglot
from l2l_implicit.tasks.image_table import Device, ImageTable
from l2l_implicit.tasks.pictures import opened
from l2l_implicit.tasks.provide import Needed, damage_explained, provide, removed_if_interrupted
from l2l_implicit.tasks.tasksets import MODES, Benchmark, build_tasksets, refuse_unknown

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
    "omniglot": list(omniglot.NEEDED),
}
AUGMENTATIONS: dict[str, tuple[str, ...]] = {
    "cifarfs": ("lee2019",), "fc100": ("lee2019",),
    "mini_imagenet": ("normalize", "lee2019"), "tiered_imagenet": ("normalize", "lee2019"),
}  # fmt: skip
OWN = {"omniglot": ("split_seed",), **dict.fromkeys(AUGMENTATIONS, ("data_augmentation",))}
# Classes and images of each mode where the data is complete.
COMPLETE = {
    "cifarfs": ((64, 38400), (16, 9600), (20, 12000)),
    "fc100": ((60, 36000), (20, 12000), (20, 12000)),
    "mini_imagenet": ((64, 38400), (16, 9600), (20, 12000)),
    "tiered_imagenet": ((351, 448695), (97, 124261), (160, 206209)),
    "omniglot": ((1100, 22000), (100, 2000), (423, 8460)),
}


ARRAYS = ("ndarray", "dtype", "_reconstruct", "scalar", "encode")  # what numpy's are pickled by


class ArraysUnpickler(pickle.Unpickler):
    """Reads arrays and plain values; a file that asks for anything else could run it."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in ARRAYS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, not for arrays alone")
        return super().find_class(module, name)


# In place of the module in learn2learn's readers, with what they use of it.
SAFE_PICKLE = SimpleNamespace(
    load=lambda file: ArraysUnpickler(file).load(),
    _Unpickler=partial(ArraysUnpickler, encoding="latin1"),
    UnpicklingError=pickle.UnpicklingError,
)


class StoredPictures(TieredImagenet):
    """learn2learn's; what cannot be read is named."""

    def __getitem__(self, index: int) -> tuple[Tensor]:
        name = Path("tiered-imagenet", self.mode, str(index))
        return (_pixels(name, 84, bytes(self.images[index])),)


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


def cifarfs(root: Path, mode: str, device: Device) -> ImageTable:
    """100 classes of CIFAR-100, 600 images of 32 pixels each (Bertinetto et al. 2019)."""
    short, needed = SHORT[mode], NEEDED["cifarfs"]
    copied = needed[0]._replace(path=f"cifarfs/processed/{short}")
    if not (root / copied.path).is_dir():
        leaves = ("cifarfs", "cifarfs/processed", "cifarfs.zip")
        provide("cifarfs", root, needed, partial(CIFARFS, str(root), mode, download=True), leaves)
    with damage_explained("cifarfs", root, [copied]):
        data = WholeCifarfs(str(root), mode)
        data.loader = lambda path: _pixels(Path(path), 32)
        listed = root / "cifarfs/cifar100/splits/bertinetto" / f"{short}.txt"
        # An interrupted copy leaves classes out, and would never be noticed.
        if listed.is_file() and sorted(listed.read_text().split()) != sorted(data.classes):
            raise ValueError(f"{len(data.classes)} classes where {listed} lists others")
    return ImageTable(data, data.targets, data.classes, device=device)


def fc100(root: Path, mode: str, device: Device) -> ImageTable:
    """100 classes of CIFAR-100 split by superclass, 600 images of 32 pixels each (TADAM 2018)."""
    needed = NEEDED["fc100"]
    leaves = (*(item.path for item in needed), "fc100.zip")
    provide("fc100", root, needed, partial(FC100, str(root), mode, download=True), leaves)
    with damage_explained("fc100", root, [item for item in needed if SHORT[mode] in item.path]):
        data = FC100(str(root), mode)
        images, (labels, names) = _channels_first(data.images), _consecutive(data.labels)
        return ImageTable(images, labels, names, device=device)


def mini_imagenet(root: Path, mode: str, device: Device) -> ImageTable:
    """100 classes of ImageNet, 600 images of 84 pixels each (split of Ravi & Larochelle 2017)."""
    needed = NEEDED["mini_imagenet"]

    def download() -> None:  # file by file: what is complete stays when the next one fails
        for each, name in MINI.items():
            if not (root / name).exists():
                with removed_if_interrupted([root / name]):
                    MiniImagenet(str(root), each, download=True)

    provide("mini_imagenet", root, needed, download)
    with damage_explained("mini_imagenet", root, [item for item in needed if mode in item.path]):
        data = MiniImagenet(str(root), mode)
        # data.x holds the same images as float32, four times the memory: not kept.
        images, labels = _channels_first(data.data["image_data"]), data.y.astype(int).tolist()
        return ImageTable(images, labels, list(data.class_idx), device=device)


def tiered_imagenet(root: Path, mode: str, device: Device) -> ImageTable:
    """608 classes of ImageNet split by category, 779,165 images of 84 pixels (Ren et al. 2018)."""
    needed = NEEDED["tiered_imagenet"]
    leaves = ("tiered-imagenet", *(item.path for item in needed), "tiered_imagenet.tar")
    download = partial(TieredImagenet, str(root), mode, download=True)
    provide("tiered_imagenet", root, needed, download, leaves)
    with damage_explained("tiered_imagenet", root, needed):
        data = StoredPictures(str(root), mode)
        labels, names = _consecutive(data.labels)
        if len(labels) != len(data.images):
            raise ValueError(f"{len(labels)} labels for {len(data.images)} images")
        # Not kept decoded: the encoded images are in memory already, 12 GB of them.
        return ImageTable(data, labels, names, device=device, keep=False)


def lee2019(side: int) -> Callable[[Tensor], Tensor]:
    """A random crop of the padded image, other colours, and its mirror image half the time.

    References:
        Lee, Maji, Ravichandran, Soatto (2019), section 4.1, and their code: 4 pixels of padding
        on 32, 8 on 84.
    """
    return transforms.Compose([
        transforms.RandomCrop(side, padding=padding(side)),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
        transforms.RandomHorizontalFlip(),
    ])


def padding(side: int) -> int:
    """Pixels round an image of this side that crops may reach into, see `lee2019`."""
    return 4 if side < 64 else 8


LOADERS = {loader.__name__: loader for loader in (cifarfs, fc100, mini_imagenet, tiered_imagenet)}


def learn2learn_tasksets(
    name: str,
    train_ways: int = 5, train_samples: int = 10, test_ways: int = 5, test_samples: int = 10,
    root: str | Path | None = "~/data", device: Device = None, **kwargs: Any,
) -> Benchmark:  # fmt: skip
    """(datasets, transforms) of one of learn2learn's benchmarks; images are in [0, 1].

    Args:
        name: "cifarfs", "fc100", "mini_imagenet", "tiered_imagenet" or "omniglot".
        root: where the data lies; what is missing is downloaded there. None means "~/data".
        device: where the images live, all of them decoded; None decodes when a task asks.
        kwargs: Omniglot's `split_seed`, of the split of its characters; None means 0.
            `data_augmentation` is "lee2019", of the training images, or for mini_imagenet and
            tiered_imagenet "normalize" (divide by 255), which None means too.

    Raises:
        FileNotFoundError: data that is missing and cannot be downloaded.
        ValueError: damaged data, an unknown augmentation; see also `get_tasksets`.
    """
    refuse_unknown(kwargs, OWN.get(name, ()))
    augmentation, split_seed = kwargs.get("data_augmentation"), kwargs.get("split_seed")
    if augmentation is not None:
        checks.choice("data_augmentation", augmentation, dict.fromkeys(AUGMENTATIONS[name]))
    folder = Path(root or "~/data").expanduser()
    if name == "omniglot":
        tables = omniglot.omniglot_tables(folder, split_seed or 0, device)
    else:
        with ExitStack() as reading:
            for owner in (FC100, MiniImagenet, TieredImagenet):
                module = sys.modules[owner.__module__]
                reading.enter_context(mock.patch.object(module, "pickle", SAFE_PICKLE))
            tables = {mode: LOADERS[name](folder, mode, device) for mode in MODES}
        if augmentation == "lee2019":
            tables["train"].augment = lee2019(tables["train"][0][0].shape[-1])
    found = tuple((len(tables[mode].classes), len(tables[mode])) for mode in MODES)
    if found != COMPLETE[name]:
        warnings.warn(
            f"{name}: expected {COMPLETE[name]} (classes, images) for training, validation and "
            f"test, found {found}: results do not compare with those on the whole data set",
            stacklevel=2,
        )
    also = (omniglot.rotate_classes,) if name == "omniglot" else ()
    return build_tasksets(tables, train_ways, train_samples, test_ways, test_samples, also)


LEARN2LEARN: dict[str, Callable[..., Benchmark]] = {
    name: partial(learn2learn_tasksets, name) for name in COMPLETE
}
"""Repaired benchmarks by our names."""


def _consecutive(labels: Iterable[Any]) -> tuple[list[int], list[str]]:
    """Labels 0, 1, ... in the order in which they first come, and what they were."""
    values = [operator.index(label) for label in labels]  # no fraction is dropped
    position = {label: index for index, label in enumerate(dict.fromkeys(values))}
    return [position[label] for label in values], [str(label) for label in position]


def _channels_first(images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2)


def _pixels(path: Path, side: int, stored: bytes | None = None) -> Tensor:
    with opened(path, stored) as picture:
        if picture.size != (side, side):
            width, height = picture.size
            raise ValueError(f"{width} x {height} pixels instead of {side} x {side}")
        return pil_to_tensor(picture.convert("RGB"))
