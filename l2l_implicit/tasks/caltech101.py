"""Caltech 101 as a few-shot data set: 100 categories of photographs, squared and reduced.

Li, Andreeto, Ranzato, Perona: Caltech 101, CaltechDATA, 2022, doi 10.22002/D1.20086, CC BY 4.0.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from l2l_implicit import checks
from l2l_implicit.tasks.image_table import Device, ImageTable
from l2l_implicit.tasks.pictures import kept_arrays, listing_of, read_square
from l2l_implicit.tasks.provide import removed_if_interrupted
from l2l_implicit.tasks.tasksets import MODES, Benchmark, build_tasksets, refuse_unknown

FOLDER = Path("caltech101", "101_ObjectCategories")  # below the root; torchvision's too
SOURCE = (
    "get caltech-101.zip of Caltech 101 (CaltechDATA, doi 10.22002/D1.20086, CC BY 4.0) and unpack "
    "its 101_ObjectCategories.tar.gz there, or run torchvision.datasets.Caltech101(root, "
    "download=True) with this root"
)
# By channel, of the images of the training categories in [0, 1] (measured at 32 x 32).
MEAN = (0.535, 0.519, 0.490)
STD = (0.281, 0.276, 0.291)
# 64 / 16 / 20 categories, drawn once at random. Left out: BACKGROUND_Google, which is no category,
# and Faces_easy, the faces of Faces cropped.
SPLIT: dict[str, tuple[str, ...]] = {
    "train": (
        "Faces", "Leopards", "Motorbikes", "accordion", "airplanes", "anchor", "ant", "barrel",
        "bass", "binocular", "bonsai", "brontosaurus", "butterfly", "camera", "cannon", "car_side",
        "chandelier", "cougar_body", "cougar_face", "crayfish", "crocodile", "crocodile_head",
        "dalmatian", "dollar_bill", "dragonfly", "electric_guitar", "elephant", "ewer", "flamingo",
        "flamingo_head", "garfield", "gerenuk", "grand_piano", "hedgehog", "ibis", "inline_skate",
        "joshua_tree", "kangaroo", "ketch", "lamp", "laptop", "llama", "lotus", "mandolin",
        "mayfly", "menorah", "metronome", "octopus", "pagoda", "pizza", "pyramid", "revolver",
        "rhino", "rooster", "schooner", "scorpion", "snoopy", "stegosaurus", "tick", "trilobite",
        "umbrella", "watch", "wheelchair", "yin_yang",
    ),
    "validation": (
        "buddha", "ceiling_fan", "cellphone", "cup", "dolphin", "helicopter", "panda", "platypus",
        "saxophone", "scissors", "stapler", "starfish", "sunflower", "water_lilly", "windsor_chair",
        "wrench",
    ),
    "test": (
        "beaver", "brain", "chair", "crab", "emu", "euphonium", "ferry", "gramophone", "hawksbill",
        "headphone", "lobster", "minaret", "nautilus", "okapi", "pigeon", "sea_horse",
        "soccer_ball", "stop_sign", "strawberry", "wild_cat",
    ),
}  # fmt: skip


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
        ValueError: an unknown mode, a size below 1, or a photograph that cannot be read.
        FileNotFoundError: the folder, or the folder of a category, is missing or empty.

    Example:
        >>> import pathlib, tempfile, PIL.Image
        >>> from l2l_implicit.tasks.caltech101 import FOLDER, SPLIT, Caltech101
        >>> root = tempfile.TemporaryDirectory()
        >>> for category in SPLIT["validation"]:
        ...     pathlib.Path(root.name, FOLDER, category).mkdir(parents=True)
        ...     PIL.Image.new("RGB", (40, 30)).save(f"{root.name}/{FOLDER}/{category}/1.jpg")
        >>> Caltech101("validation", root.name)[0][0].shape
        torch.Size([3, 32, 32])
    """

    def __init__(
        self, mode: str = "train", root: str | Path = "~/data", size: int = 32,
        device: Device = None,
    ) -> None:  # fmt: skip
        checks.choice("mode", mode, MODES)
        checks.count("size", size)
        folder, names = Path(root).expanduser() / FOLDER, SPLIT[mode]
        found = [sorted((folder / name).glob("*.jpg")) for name in names]
        empty = [name for name, own in zip(names, found, strict=True) if not own]
        if empty:
            raise FileNotFoundError(
                f"expected .jpg files for each of {len(names)} categories in {folder}, found none "
                f"for {', '.join(empty[:3])}{' and others' * (len(empty) > 3)}: {SOURCE}"
            )
        paths = [path for own in found for path in own]
        arrays = kept_arrays(
            folder.with_name(f"reduced_{mode}_{size}.npz"),
            listing_of(paths, folder),
            lambda: {"images": np.stack([read_square(path, size)[0] for path in paths])},
        )
        labels = [label for label, own in enumerate(found) for _ in own]
        super().__init__(torch.from_numpy(arrays["images"]), labels, names, MEAN, STD, device)


def caltech101_tasksets(
    train_ways: int = 5, train_samples: int = 10, test_ways: int = 5, test_samples: int = 10,
    root: str | Path | None = "~/data", device: Device = None, size: int = 32, **kwargs: Any,
) -> Benchmark:  # fmt: skip
    """(datasets, transforms) of Caltech 101, as learn2learn's own benchmarks return them.

    Args:
        train_ways, train_samples, test_ways, test_samples, device, kwargs: see `get_tasksets`.
        root: see `Caltech101`; None means "~/data". Where it has no photographs torchvision
            downloads them.
        size: side of the images in pixels.

    Raises:
        FileNotFoundError: the images are not there, and cannot be downloaded.

    Example:
        >>> from l2l_implicit.tasks import TASKSETS, caltech101_tasksets
        >>> TASKSETS["caltech101"] is caltech101_tasksets
        True
    """
    refuse_unknown(kwargs, own=("size",))
    folder = Path(root or "~/data").expanduser()
    wanted, base = folder / FOLDER, folder / FOLDER.parent
    if not wanted.is_dir():
        try:
            with removed_if_interrupted([wanted, base / "caltech-101.zip", base / "caltech-101"]):
                torchvision.datasets.Caltech101(str(folder), download=True)
        except Exception as error:
            raise FileNotFoundError(
                f"expected the photographs in {wanted}, found no folder and could not download "
                f"them ({type(error).__name__}): {SOURCE}"
            ) from error
    tables = {mode: Caltech101(mode, folder, size, device) for mode in MODES}
    return build_tasksets(tables, train_ways, train_samples, test_ways, test_samples)
