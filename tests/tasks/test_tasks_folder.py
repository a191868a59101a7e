"""The user's own images: layouts, formats, what cannot be read, what is too little."""

import os
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_benchmarks
import torch
from disk_formats import write_classes, write_folder
from PIL import Image

from experiments.tracking import UserError
from l2l_implicit.tasks import folder_tables, get_tasksets
from l2l_implicit.tasks.pictures import read_square

made = partial(small_benchmarks.made, "folder")


def write_plain(root: Path, suffix: str, picture: Image.Image) -> Path:
    """Three classes of one picture, twice; the last file."""
    for path in [root / f"class{n // 2}" / f"{n % 2}.{suffix}" for n in range(6)]:
        path.parent.mkdir(exist_ok=True)
        picture.save(path)
    return path


def test_three_folders_are_the_three_modes(tmp_path: Path) -> None:
    """Hidden files and folders are no images; a class name in two modes is told."""
    write_folder(tmp_path, 4, 3)
    (tmp_path / "train" / ".thumbnails").mkdir()
    (tmp_path / "train" / "train0" / ".DS_Store").write_text("no image")
    benchmark = made(tmp_path, size=12)
    episode = benchmark.stream("test", 0).sample()
    assert episode.inputs.shape == (9, 3, 12, 12)
    assert episode.support_targets.tolist() == [0, 1, 2]
    noted, names = benchmark.describe(), [f"test{i}" for i in range(4)]
    assert noted["classes"] == {"train": 4, "validation": 4, "test": 4}
    assert noted["samples"] == {"train": 12, "validation": 12, "test": 12}
    files = noted["notes"]["test"].pop("files")
    assert noted["notes"]["test"] == {"classes": names, "skipped": 0, "split_seed": None}
    tmp_path = tmp_path.rename(f"{tmp_path}_elsewhere")
    assert folder_tables(tmp_path)["train"].notes["files"] == files
    sets = get_tasksets("folder", root=tmp_path, train_ways=2, train_samples=2, test_ways=2,
                        test_samples=2, device="cpu", size=10)
    assert sets.train.sample()[0].shape == (4, 3, 10, 10)
    (tmp_path / "test" / "test1").rename(tmp_path / "test" / "train1")
    with pytest.warns(UserWarning, match=r"1 classes have one name in two of .* \(train1\)"):
        assert made(tmp_path).describe()["notes"]["train"]["files"] != files


def test_one_folder_is_split_by_seed(tmp_path: Path) -> None:
    """A class may be called train."""
    write_classes(tmp_path, 25)
    (tmp_path / "class00").rename(tmp_path / "train")
    random.seed(0)
    first, same, other = (
        {mode: table.classes for mode, table in folder_tables(tmp_path, 4, seed).items()}
        for seed in (None, 0, 1)
    )
    assert [len(first[mode]) for mode in ("train", "validation", "test")] == [16, 4, 5]
    names = [name for mode in first.values() for name in mode]
    assert len(set(names)) == 25 and "train" in names and first == same != other
    assert made(tmp_path).describe()["notes"]["train"]["split_seed"] == 0


@pytest.mark.parametrize(("change", "options", "message"), [
    (lambda root: (root / "validation").rename(root / "val"), {},
     "each of train, validation and test of .*, found test, train, val: name all three so"),
    (lambda root: None, {"split_seed": 3}, "expected no split_seed where .* got 3"),
    (lambda root: (root / "test/alias").symlink_to(root / "train/train0"), {},
     "expected every class once, got .*train0 under two names: remove the link"),
    (lambda root: [shutil.rmtree(root), write_classes(root, 25)], {"split_seed": -1},
     "split_seed: expected a number of at least 0, got -1"),
    (lambda root: None, {"size": 0}, "size: expected at least 1, got 0"),
    (lambda root: (root / "train/train0/more").mkdir(), {}, "found the folder .*more: move"),
    (lambda root: None, {"test_ways": 6}, "number of validation classes, got 6"),
    (lambda root: [p.unlink() for p in (root / "test/test2").glob("[1-3].png")], {},
     r"test_samples between 1 and 1, the images in the smallest test class \(test2\), got 3"),
    (lambda root: [p.unlink() for p in (root / "train/train3").iterdir()], {},
     r"images in every train class, got none in train3: give it at least 3"),
    *((lambda root, to=to: (root / "train/gone").symlink_to(to), {},
       f"got .*gone .*{reason}.*: mend or remove it")
      for to, reason in (("/no/where", "No such file"), ("gone", "symbolic links"))),
    (lambda root: shutil.rmtree(root), {}, "a folder of images at .*, found none: pass root="),
    (lambda root: [shutil.rmtree(path) for path in root.iterdir()], {},
     "one folder for each class in .*, found none: put images"),
    (lambda root: [shutil.rmtree(root), write_classes(root, 2)], {"ways": 2, "test_ways": 3},
     "at least 3 validation classes, got none: add classes"),
])  # fmt: skip
def test_what_the_folder_cannot_give(
    change: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_folder(tmp_path / "images", 4, 4)
    change(tmp_path / "images")
    with pytest.raises(UserError, match=f"tasks.name=folder: .*{message}") as raised:
        made(tmp_path / "images", **options)
    assert "\n" not in str(raised.value)


def test_unreadable_images_are_counted_or_skipped(tmp_path: Path) -> None:
    """A text file, and one image cut short; that each is named: test_pictures."""
    write_folder(tmp_path, 3, 4)
    text, whole = tmp_path / "train" / "train1" / "notes.txt", tmp_path / "test/test0/0.png"
    text.write_text("no image")
    whole.write_bytes(whole.read_bytes()[:60])
    said = rf"a picture that Pillow reads in {text}.*skip_unreadable=True.*\(2 such files\)$"
    with pytest.raises(UserError, match=said):
        made(tmp_path)
    with pytest.warns(UserWarning, match="skipped 2 of 37 files .* the first: .*notes.txt"):
        noted = made(tmp_path, skip_unreadable=True).describe()
    assert noted["samples"] == {"train": 12, "validation": 12, "test": 11}
    assert noted["notes"]["train"]["skipped"] == 2


def test_second_start_reads_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the folder cannot be written, which does not matter otherwise."""
    write_folder(tmp_path, 3, 3)

    def refuse(*names: object) -> None:
        raise PermissionError("read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        assert len(folder_tables(tmp_path, 6)["train"]) == 9
        assert not list(tmp_path.glob(".reduced*"))
    first = folder_tables(tmp_path, 6)

    def fail(*arguments: object, **options: object) -> None:
        raise SystemExit("an image was read again")  # an Exception would be a picture's fault

    monkeypatch.setattr(Image, "open", fail)
    second = folder_tables(tmp_path, 6)
    assert all(torch.equal(first[mode].images, second[mode].images) for mode in first)
    with pytest.raises(SystemExit, match="read again"):
        folder_tables(tmp_path, 7)


def test_an_image_changed_in_place_is_read_again(tmp_path: Path) -> None:
    path = write_plain(tmp_path, "bmp", Image.new("RGB", (5, 5), (10, 20, 30)))
    first = folder_tables(tmp_path, 5, split_seed=0)["train"]
    size = path.stat().st_size
    Image.new("RGB", (5, 5), (200, 20, 30)).save(path)
    os.utime(path, (1, 1))
    assert path.stat().st_size == size
    again = folder_tables(tmp_path, 5, split_seed=0)
    images = torch.cat([table.images for table in again.values()])
    assert images[:, 0].max() == 200 and first.images[:, 0].max() == 10


def test_normalised_with_the_training_images_own_statistics(tmp_path: Path) -> None:
    write_folder(tmp_path, 4, 5)
    tables = folder_tables(tmp_path, 20)
    train = torch.stack([tables["train"][i][0] for i in range(20)]).double()
    # Three roundings to float32, 6e-8 each, of numbers up to 1, over deviations of about 0.25.
    atol = 5e-6
    assert torch.allclose(train.mean((0, 2, 3)), torch.zeros(3).double(), atol=atol)
    assert torch.allclose(train.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=atol)
    raw, test = (tables[mode].images.double() / 255 for mode in ("train", "test"))
    std, mean = torch.std_mean(raw, (0, 2, 3), correction=0, keepdim=True)
    assert torch.allclose(tables["test"][3][0].double(), ((test - mean) / std)[3], atol=atol)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("1", 1), ("I;16", 1), ("RGB", 3)])
def test_one_channel_where_all_images_are_grey(mode: str, channels: int, tmp_path: Path) -> None:
    """And images of one colour are only shifted."""
    path = write_plain(tmp_path, "png", Image.new(mode, (6, 6), 0 if channels == 1 else (1, 2, 3)))
    table = folder_tables(tmp_path, 6)["train"]
    assert table.images.shape[1] == channels and table[0][0].abs().max() < 1e-6
    Image.new("RGB", (6, 6), (1, 2, 3)).save(path)  # one in colour: all have three channels
    assert folder_tables(tmp_path, 6)["train"].images.shape[1] == 3


@pytest.mark.parametrize("options, second", [({}, 1), ({"transparency": 257}, 255)])
def test_deep_grey_levels_are_reduced_not_clipped(
    options: dict[str, int], second: int, tmp_path: Path
) -> None:
    """A transparent one becomes white."""
    levels = np.array([[0, 257], [32896, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png", **options)
    pixels, grey = read_square(tmp_path / "deep.png", 2)
    assert grey and pixels[0].tolist() == [[0, second], [128, 255]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_becomes_white(mode: str, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 2, 4))
    options = {}
    if mode == "P":
        picture = Image.new("P", (4, 4), 1)
        picture.putpalette([0, 0, 0, 77, 77, 77])
        picture.paste(0, (0, 0, 2, 4))
        options = {"transparency": 1}
    picture.convert(mode).save(tmp_path / "clear.png", **options)
    pixels, grey = read_square(tmp_path / "clear.png", 4)
    assert pixels[:, :, :2].max() == 0 and pixels[:, :, 2:].min() == 255
    assert grey == (mode == "LA")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tiff", "webp", "ppm"])
def test_every_common_format_is_read(suffix: str, tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (200, 200, 200)).save(tmp_path / f"picture.{suffix}")
    pixels, _ = read_square(tmp_path / f"picture.{suffix}", 3)
    assert pixels.shape == (3, 3, 3) and np.abs(pixels.astype(int) - 200).max() <= 2
