"""Learn2learn's five benchmarks as task sets, with the defects of its version 0.2.0 routed round.

The images come from learn2learn's and torchvision's own classes, and the task transforms are
learn2learn's. See `docs/tasks.md` for what each file is and where it belongs.
"""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from l2l_implicit.tasks.image_table import ImageTable, LabelledData, LazyImages
from l2l_implicit.tasks.learn2learn_tables import LOADERS
from l2l_implicit.tasks.omniglot import RotateClasses, omniglot_tables
from l2l_implicit.tasks.tasksets import MODES, Benchmark, Tables, build_tasksets, refuse_unknown

AUGMENTED = ("mini_imagenet", "tiered_imagenet")
# Classes and images of each mode where the data is complete.
COMPLETE = {
    "cifarfs": ((64, 38400), (16, 9600), (20, 12000)),
    "fc100": ((60, 36000), (20, 12000), (20, 12000)),
    "mini_imagenet": ((64, 38400), (16, 9600), (20, 12000)),
    "tiered_imagenet": ((351, 448695), (97, 124261), (160, 206209)),
    "omniglot": ((1100, 22000), (100, 2000), (423, 8460)),
}


def learn2learn_tasksets(
    name: str,
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str | Path | None = "~/data",
    device: torch.device | str | None = None,
    split_seed: int | None = None,
    data_augmentation: str | None = None,
    **kwargs: Any,
) -> Benchmark:
    """(datasets, transforms) of one of learn2learn's benchmarks; images are in [0, 1].

    Args:
        name: "cifarfs", "fc100", "mini_imagenet", "tiered_imagenet" or "omniglot".
        train_ways, test_ways: classes of a task (test: also of validation tasks).
        train_samples, test_samples: images of a class in a task, shots plus queries.
        root: where the data lies; what is missing is downloaded there. None means "~/data".
        device: where the images live, all of them decoded; None decodes when a task asks.
        split_seed: omniglot: of the split of its characters, None means 0.
        data_augmentation: mini_imagenet, tiered_imagenet: "normalize" (divide by 255) or None,
            which means the same; learn2learn's "lee2019" is refused.
        kwargs: nothing else.

    Raises:
        FileNotFoundError: data that is missing and cannot be downloaded.
        ValueError: damaged data, more ways or samples than there are, "lee2019".
        TypeError: an option that this benchmark does not have.
    """
    if name in AUGMENTED:
        check_augmentation(data_augmentation)
    elif data_augmentation is not None:
        kwargs["data_augmentation"] = data_augmentation
    if name != "omniglot" and split_seed is not None:
        kwargs["split_seed"] = split_seed
    own = {"omniglot": ("split_seed",)}.get(name, ())
    refuse_unknown(kwargs, own=own + ("data_augmentation",) * (name in AUGMENTED))
    tables = _tables(name, Path(root or "~/data").expanduser(), split_seed or 0)
    _warn_if_incomplete(name, tables)
    tables = {mode: _on_device(table, device) for mode, table in tables.items()}
    also = (RotateClasses,) if name == "omniglot" else ()
    return build_tasksets(tables, train_ways, train_samples, test_ways, test_samples, also)


LEARN2LEARN: dict[str, Callable[..., Benchmark]] = {
    name: partial(learn2learn_tasksets, name) for name in COMPLETE
}
"""Repaired benchmarks by our names."""


def check_augmentation(value: str | None) -> None:
    """Raises ValueError for what learn2learn offers and does wrong, and for unknown names."""
    if value == "lee2019":
        raise ValueError(
            "expected data_augmentation 'normalize', got 'lee2019', which learn2learn 0.2.0 has "
            "wrong (training images overflow 8 bit, test images are not divided by 255): leave it "
            "out"
        )
    if value not in (None, "normalize"):
        raise ValueError(
            f"expected data_augmentation 'normalize', got {value!r}: leave it out for the same"
        )


def _tables(name: str, root: Path, split_seed: int) -> Tables:
    if name == "omniglot":
        return omniglot_tables(root, split_seed)
    return {mode: LOADERS[name](root, mode) for mode in MODES}


def _on_device(table: LabelledData, device: torch.device | str | None) -> LabelledData:
    if isinstance(table, LazyImages):
        return table.on_device(device)
    if isinstance(table, ImageTable) and device is not None:
        return ImageTable(table.images, table.labels.tolist(), table.classes, device=device)
    return table


def _warn_if_incomplete(name: str, tables: Tables) -> None:
    found = tuple((len(tables[mode].classes), len(tables[mode])) for mode in MODES)
    if found != COMPLETE[name]:
        warnings.warn(
            f"{name}: expected {COMPLETE[name]} (classes, images) for training, validation and "
            f"test, found {found}: results do not compare with those on the whole data set",
            stacklevel=3,
        )
