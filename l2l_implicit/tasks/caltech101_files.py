"""Caltech 101 on disk: finds the photographs, reduces them, and keeps the result for next time."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import Caltech101

from l2l_implicit.tasks.kept_arrays import Arrays as Kept
from l2l_implicit.tasks.kept_arrays import kept_arrays, listing_of
from l2l_implicit.tasks.provide import BROKEN, removed_if_interrupted
from l2l_implicit.tasks.read_image import central_square

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images [n, 3, size, size], labels [n]

SOURCE = (
    "get caltech-101.zip of Caltech 101 (CaltechDATA, doi 10.22002/D1.20086, CC BY 4.0) and unpack "
    "its 101_ObjectCategories.tar.gz there, or run torchvision.datasets.Caltech101(root, "
    "download=True) with this root"
)


def fetch(root: Path) -> None:
    """Let torchvision download the photographs where they are missing.

    Raises:
        FileNotFoundError: it cannot; says what belongs where.
    """
    folder = root / "caltech101"
    wanted = folder / "101_ObjectCategories"
    if wanted.is_dir():
        return
    try:
        with removed_if_interrupted([wanted, folder / "caltech-101.zip", folder / "caltech-101"]):
            Caltech101(str(root), download=True)
    except BROKEN as error:
        raise FileNotFoundError(
            f"expected the photographs in {wanted}, found no folder and could not download them "
            f"({type(error).__name__}): {SOURCE}"
        ) from error


def split_folder(root: Path, categories: Sequence[str]) -> Path:
    """`root/caltech101/101_ObjectCategories`, once every category is known to have photographs.

    Raises:
        FileNotFoundError: the folder is missing, or a category has no .jpg file in it.
    """
    folder = root / "caltech101" / "101_ObjectCategories"
    if not folder.is_dir():
        raise FileNotFoundError(f"expected the photographs in {folder}, found no folder: {SOURCE}")
    empty = [name for name in categories if next((folder / name).glob("*.jpg"), None) is None]
    if empty:
        raise FileNotFoundError(
            f"expected .jpg files for each of {len(categories)} categories in {folder}, found none "
            f"for {', '.join(empty[:3])}{' and others' * (len(empty) > 3)}: {SOURCE}"
        )
    return folder


def images_of(folder: Path, categories: Sequence[str], size: int, mode: str) -> Arrays:
    """The reduced photographs of these categories, from the file of an earlier call if it fits."""
    paths = [path for name in categories for path in sorted((folder / name).glob("*.jpg"))]

    def make() -> Kept:
        position = {name: label for label, name in enumerate(categories)}
        labels = np.array([position[path.parent.name] for path in paths], np.int64)
        return {"images": np.stack([reduce_photograph(p, size) for p in paths]), "labels": labels}

    kept = folder.with_name(f"reduced_{mode}_{size}.npz")
    arrays = kept_arrays(kept, listing_of(paths, folder), make)
    return arrays["images"], arrays["labels"]


def reduce_photograph(path: Path, size: int) -> NDArray[np.uint8]:
    """The central square of a photograph, bilinearly reduced: uint8 RGB [3, size, size]."""
    with Image.open(path) as photograph:
        return central_square(photograph.convert("RGB"), size)
