"""Small data sets in the formats that the real ones have on disk, for tests from end to end.

Each class has a colour (or a stroke) of its own with noise on it, so that tasks can be solved.
`WRITERS[name](root, classes, images)` writes one with so many classes in each of training,
validation and test (omniglot: at least) and so many images a class.
"""

import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from l2l_implicit.tasks.caltech101 import SPLIT

SHORT = ("train", "val", "test")
Pixels = NDArray[np.uint8]


def photographs(classes: int, images: int, side: int, seed: int = 0) -> Iterator[list[Pixels]]:
    """One list of uint8 [side, side, 3] for each class."""
    rng = np.random.RandomState(seed)
    for _ in range(classes):
        colour = rng.randint(40, 216, 3)
        noise = rng.randint(-40, 40, (images, side, side, 3))
        yield list((colour + noise).astype(np.uint8))


def save(pixels: Pixels, path: Path) -> None:
    """As PNG, whatever the file is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="png")


def write_cifarfs(root: Path, classes: int = 6, images: int = 10) -> None:
    """`cifarfs/cifar100/data/<class>/*.png` and lists of the classes of each mode."""
    base = root / "cifarfs" / "cifar100"
    for number, mode in enumerate(SHORT):
        names = [f"{mode}_{label:02}" for label in range(classes)]
        for name, pictures in zip(names, photographs(classes, images, 32, number), strict=True):
            for index, pixels in enumerate(pictures):
                save(pixels, base / "data" / name / f"{name}_s_{index:06}.png")
        lists = base / "splits" / "bertinetto"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{mode}.txt").write_text("".join(f"{name}\n" for name in names))


def write_fc100(root: Path, classes: int = 6, images: int = 10) -> None:
    """`FC100_train.pickle` and its like: images [n, 32, 32, 3], labels as a list."""
    root.mkdir(parents=True, exist_ok=True)
    for number, mode in enumerate(SHORT):
        data = np.concatenate(list(photographs(classes, images, 32, number)))
        labels = np.arange(classes).repeat(images).tolist()
        content = {"data": data.reshape(-1, 32, 32, 3), "labels": labels}
        (root / f"FC100_{mode}.pickle").write_bytes(pickle.dumps(content))


def write_mini_imagenet(root: Path, classes: int = 6, images: int = 10) -> None:
    """`mini-imagenet-cache-train.pkl` and its like: images [n, 84, 84, 3], indices by class."""
    root.mkdir(parents=True, exist_ok=True)
    for number, mode in enumerate(("train", "validation", "test")):
        data = np.concatenate(list(photographs(classes, images, 84, number)))
        rows = np.arange(classes * images).reshape(classes, images).tolist()
        names = {f"n{number}{label:07}": indices for label, indices in enumerate(rows)}
        content = {"image_data": data.reshape(-1, 84, 84, 3), "class_dict": names}
        (root / f"mini-imagenet-cache-{mode}.pkl").write_bytes(pickle.dumps(content))


def write_tiered_imagenet(root: Path, classes: int = 6, images: int = 10) -> None:
    """`tiered-imagenet/train_images_png.pkl` and its like: a list of encoded images, labels."""
    folder = root / "tiered-imagenet"
    folder.mkdir(parents=True, exist_ok=True)
    for number, mode in enumerate(SHORT):
        pictures = [p for c in photographs(classes, images, 84, number) for p in c]
        encoded = [np.frombuffer(_png(pixels), np.uint8)[:, None] for pixels in pictures]
        labels = np.arange(classes).repeat(images)
        (folder / f"{mode}_images_png.pkl").write_bytes(pickle.dumps(encoded))
        content = {"label_specific": labels, "label_general": labels // 2}
        (folder / f"{mode}_labels.pkl").write_bytes(pickle.dumps(content))


def write_omniglot(root: Path, classes: int = 6, images: int = 10) -> None:
    """`omniglot-py/images_background/<alphabet>/character01/0001_01.png`, and evaluation.

    Of 1,623 characters 100 are for validation, so this writes 17 for each class asked for.
    """
    rng = np.random.RandomState(0)
    for number in range(17 * classes):
        part = "images_background" if number % 2 else "images_evaluation"
        alphabet = f"Alphabet_{number % 2}{number // 40:02}"
        character = f"character{number // 2 % 20 + 1:02}"
        ends = rng.randint(10, 95, 4)
        for index in range(images):
            drawing = np.full((105, 105), True)  # black ink on white paper, one bit a pixel
            x, y = (np.linspace(ends[i], ends[i + 2], 200).astype(int) for i in (0, 1))
            shift = rng.randint(-4, 5)
            for width in range(4):
                drawing[y + shift, x + width] = False
            folder = root / "omniglot-py" / part / alphabet / character
            save(drawing, folder / f"{number:04}_{index + 1:02}.png")


def write_caltech101(root: Path, classes: int = 0, images: int = 10) -> None:
    """`caltech101/101_ObjectCategories/<category>/image_0001.jpg`: always all 100 categories."""
    names = [name for mode in SPLIT.values() for name in mode]
    for name, pictures in zip(names, photographs(len(names), images, 16), strict=True):
        for index, pixels in enumerate(pictures):
            folder = root / "caltech101" / "101_ObjectCategories" / name
            save(pixels, folder / f"image_{index + 1:04}.jpg")


def write_classes(root: Path, classes: int, images: int = 3) -> None:
    """`<class>/*.png`."""
    for label, pictures in enumerate(photographs(classes, images, 9)):
        for index, pixels in enumerate(pictures):
            save(pixels, root / f"class{label:02}" / f"{index}.png")


def write_folder(root: Path, classes: int = 6, images: int = 10) -> None:
    """`train/<class>/*.png`, and validation and test."""
    for number, mode in enumerate(("train", "validation", "test")):
        for label, pictures in enumerate(photographs(classes, images, 20, number)):
            for index, pixels in enumerate(pictures):
                save(pixels, root / mode / f"{mode}{label}" / f"{index}.png")


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "cifarfs": write_cifarfs,
    "fc100": write_fc100,
    "mini_imagenet": write_mini_imagenet,
    "tiered_imagenet": write_tiered_imagenet,
    "omniglot": write_omniglot,
    "caltech101": write_caltech101,
    "folder": write_folder,
}
