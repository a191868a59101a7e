"""Caltech 101 on a tiny folder of made-up photographs in the real layout."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from l2l_implicit.tasks import Caltech101
from l2l_implicit.tasks.caltech101 import MEAN, SPLIT, STD

COLOUR = (200, 100, 50)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three photographs, 24 x 12 pixels, in each of the 100 categories and in the two left out."""
    photograph = Image.new("RGB", (24, 12), (0, 0, 0))
    photograph.paste(COLOUR, (6, 0, 18, 12))  # the central square; the sides are cut away
    for names in (*SPLIT.values(), ("BACKGROUND_Google", "Faces_easy")):
        for name in names:
            folder = tmp_path / "caltech101" / "101_ObjectCategories" / name
            folder.mkdir(parents=True)
            for number in range(1, 4):
                photograph.save(folder / f"image_{number:04}.jpg", quality=95, subsampling=0)
    return tmp_path


def test_split_is_disjoint_and_has_one_category_of_faces() -> None:
    names = [name for mode in SPLIT.values() for name in mode]
    assert [len(SPLIT[mode]) for mode in ("train", "validation", "test")] == [64, 16, 20]
    assert len(set(names)) == 100 and "Faces" in names
    assert not {"Faces_easy", "BACKGROUND_Google"} & set(names)


def test_items_are_normalised_photographs(root: Path) -> None:
    test = Caltech101("test", root, size=8)
    image, label = test[4]
    assert len(test) == 60 and test.classes == list(SPLIT["test"]) and label == 1
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32
    assert test.images.dtype == torch.uint8 and test.images.shape == (60, 3, 8, 8)
    shown = image * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    centre = shown[:, 2:-2, 2:-2] * 255  # JPEG blurs the edge between square and sides
    assert torch.allclose(centre, torch.tensor(COLOUR)[:, None, None].float(), atol=4)


def test_a_missing_category_and_wrong_options_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match="got 'valid'. did you mean 'validation'"):
        Caltech101("valid", root)
    with pytest.raises(TypeError, match="size: expected a whole number, got 8.0"):
        Caltech101("train", root, size=8.0)
    for path in root.glob("*/*/accordion/*"):
        path.unlink()
    mode = next(mode for mode, names in SPLIT.items() if "accordion" in names)
    with pytest.raises(FileNotFoundError, match="found none for accordion: get caltech-101.zip"):
        Caltech101(mode, root)
    with pytest.raises(FileNotFoundError, match="CC BY 4.0.*Caltech101.root, download=True"):
        Caltech101("train", root / "nowhere")
