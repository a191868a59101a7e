"""The user's own images: layouts, formats, what is too little, and what is no picture."""

import io
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_benchmarks
import torch
from disk_formats import photographs, save, write_folder
from PIL import Image, ImageOps
from pytest import MonkeyPatch

from experiments.tracking import UserError
from l2l_implicit.tasks import folder_tables, get_tasksets
from l2l_implicit.tasks.pictures import FEW_PIXELS, listing_of, read_square

made = partial(small_benchmarks.made, "folder")


def write_classes(root: Path, classes: int, images: int = 3) -> None:
    """`root/<class>/*.png`."""
    for label, pictures in enumerate(photographs(classes, images, 9)):
        for index, pixels in enumerate(pictures):
            save(pixels, root / f"class{label:02}" / f"{index}.png")


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
    assert noted["notes"]["test"] == {"classes": names, "skipped": 0, "split_seed": None}
    sets = get_tasksets("folder", root=tmp_path, train_ways=2, train_samples=2, test_ways=2,
                        test_samples=2, device="cpu", size=10)
    assert sets.train.sample()[0].shape == (4, 3, 10, 10)
    (tmp_path / "test" / "test1").rename(tmp_path / "test" / "train1")
    with pytest.warns(UserWarning, match=r"1 classes have one name in two of .* \(train1\)"):
        made(tmp_path)


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
    (lambda root: None, {"size": 0}, "size of at least 1 pixel, got 0"),
    (lambda root: None, {"level": "easy"}, "got level='easy'"),
    (lambda root: (root / "train/train0/more").mkdir(), {}, "found the folder .*more: move"),
    (lambda root: None, {"ways": 5},
     "train_ways between 1 and 4, the number of train classes, got 5"),
    (lambda root: None, {"test_ways": 6}, "number of validation classes, got 6"),
    (lambda root: [p.unlink() for p in (root / "test/test2").glob("[1-3].png")], {},
     r"test_samples between 1 and 1, the images in the smallest test class \(test2\), got 3"),
    (lambda root: [p.unlink() for p in (root / "train/train3").iterdir()], {},
     r"images in every train class, got none in train3: give it at least 3"),
    (lambda root: [shutil.rmtree(root / mode) for mode in ("train", "test")], {},
     "each of train, validation and test"),
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


def test_unreadable_images_are_named_or_skipped_and_counted(tmp_path: Path) -> None:
    """A text file, and one image cut short."""
    write_folder(tmp_path, 3, 4)
    text, whole = tmp_path / "train" / "train1" / "notes.txt", tmp_path / "test/test0/0.png"
    text.write_text("no image")
    whole.write_bytes(whole.read_bytes()[:60])
    for _ in range(2):  # also when the reduced images are read from the kept file
        with pytest.raises(UserError) as raised:
            made(tmp_path)
        message = str(raised.value)
        assert f"a picture that Pillow reads in {text}" in message and "\n" not in message
        assert "skip_unreadable=True" in message and message.endswith("(2 such files)")
        with pytest.warns(UserWarning, match="skipped 2 of 37 files .* the first: .*notes.txt"):
            noted = made(tmp_path, skip_unreadable=True).describe()
        assert noted["samples"] == {"train": 12, "validation": 12, "test": 11}
        assert noted["notes"]["train"]["skipped"] == 2
    with pytest.warns(UserWarning, match="skipped 2"), pytest.raises(
        UserError, match=r"between 1 and 3, .* test class \(test0\), got 4"
    ):
        made(tmp_path, skip_unreadable=True, test_queries=3)


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


def test_deep_grey_levels_are_reduced_not_clipped(tmp_path: Path) -> None:
    levels = np.array([[0, 257], [32896, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    pixels, grey = read_square(tmp_path / "deep.png", 2)
    assert grey and pixels[0].tolist() == [[0, 1], [128, 255]]


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


# What is no picture: an error with its name, or left out.


ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve classes of three small pictures."""
    write_classes(tmp_path, 12)
    return tmp_path


def tiff(levels: object) -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), levels)), "tiff")


def encoded(picture: Image.Image, format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=format)
    return file.getvalue()


def half(format: str) -> bytes:
    whole = encoded(Image.fromarray(next(photographs(1, 1, 64))[0]), format)
    return whole[: len(whole) // 2]


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the whole path is too long for an address
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, depth: int, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


def dds(code: bytes) -> bytes:
    """A kind of picture of which Pillow says NotImplementedError."""
    header = struct.pack("<7I", 124, 0x1007, 8, 8, 0, 0, 0) + bytes(44)
    return b"DDS " + header + struct.pack("<2I4s5I", 32, 4, code, 0, 0, 0, 0, 0) + bytes(276)


def icon() -> bytes:
    """One pixel, says the header; the picture inside, a grey PNG of 16 bit, is large."""
    inner = png(3000, 16, bytes(6001 * 3000))
    entry = struct.pack("<BBBBHHII", 1, 1, 0, 0, 1, 32, len(inner), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + inner


NO_PICTURES: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "socket": (bound_socket, "got no regular file"),
    "device": (link("/dev/zero"), "got no regular file"),
    "link to nowhere": (link("nowhere.png"), "got no regular file"),
    "link to itself": (link("odd.png"), "got no regular file"),
    "folder": (Path.mkdir, "found the folder"),
    "link to a folder": (link("../class01"), "found the folder"),
    "nothing": (Path.touch, "cannot identify image file it"),
    "text": (b"no picture", "cannot identify"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "cannot identify"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "identify"),
    "icon": (icon(), "cannot load"),  # it could be a TGA
    "unknown DDS": (dds(b"ABCD"), ""), "half a JPEG": (half("jpeg"), "truncated"),
    **{f"half a {format}": (half(format), "") for format in ("png", "webp", "gif", "tiff")},
    "header of a large PNG": (png(50_000, 8), "exceeds limit of"),
    "large and small": (png(9000, 1, bytes(1126 * 9000)), r"9000 x 9000 pixels in \d+ by"),
    "levels of 32 bit": (tiff(np.int32(70_000)), "instead of 0 to 65535"),
    "negative levels": (tiff(np.int32(-1)), "instead of 0 to 65535"),
    "floats to 255": (tiff(np.float32(255)), "levels from 255 to 255"),
    "nan": (tiff(np.float32(np.nan)), "levels from nan to nan"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_named_or_left_out(name: str, root: Path) -> None:
    odd, reason = NO_PICTURES[name]
    path = root / "class03" / "odd.png"
    path.write_bytes(odd) if isinstance(odd, bytes) else odd(path)
    with pytest.raises(ValueError, match=f"{reason}.*or pass skip_unreadable=True$") as raised:
        folder_tables(root, 8)
    assert "class03/odd.png" in str(raised.value) and "\n" not in str(raised.value)
    for _ in range(2):  # also where the others are read from the kept file
        with pytest.warns(UserWarning, match="skipped 1 of 37 files .*class03/odd.png"):
            tables = folder_tables(root, 8, skip_unreadable=True)
        assert sum(map(len, tables.values())) == 36 and tables["train"].skipped == 1


@contextmanager
def filled_fifo(path: Path) -> Iterator[None]:
    """Whoever opens it finds something to read, and does not wait."""
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        os.write(descriptor, bytes(60_000))
        yield
    finally:
        os.close(descriptor)


def test_a_fifo_is_not_opened(root: Path) -> None:
    with filled_fifo(root / "class03" / "odd.png"):
        with pytest.raises(ValueError, match="odd.png, got no regular file"):
            folder_tables(root, 8)
        with pytest.warns(UserWarning, match="skipped 1 of 37"):
            folder_tables(root, 8, skip_unreadable=True)
    with filled_fifo(root / ".reduced_9.npz"):  # in place of the kept file
        with pytest.warns(UserWarning, match="skipped 1 of 37"):
            assert len(folder_tables(root, 9, skip_unreadable=True)["train"]) == 24


def test_what_can_be_read_again_is_read_again(root: Path) -> None:
    path = root / "class03" / "1.png"
    path.rename(root / "elsewhere")
    path.symlink_to("../nowhere")
    with pytest.raises(ValueError, match="class03/1.png, got no regular file"):
        folder_tables(root, 8)
    (root / "elsewhere").rename(root / "nowhere")
    assert folder_tables(root, 8)["train"].skipped == 0
    before = listing_of([path], root, times=True)
    path.chmod(0o400)  # neither size nor time of change: but who may read it
    assert listing_of([path], root, times=True) != before


def test_a_file_that_may_not_be_read(root: Path, monkeypatch: MonkeyPatch) -> None:
    """As for anybody but root, who reads everything."""
    path, real = root / "class03" / "1.png", open

    def refuse(file: object, *arguments: object, **options: object) -> object:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match="class03/1.png, got .*Permission denied: it: remove"):
        folder_tables(root, 8)


@pytest.mark.parametrize("error", [RecursionError, MemoryError, NotImplementedError, Warning])
def test_whatever_the_reader_raises(
    error: type[Exception], root: Path, monkeypatch: MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(ValueError, match=f"class../..png, got {error.__name__}: remove"):
        folder_tables(root, 8)


HOSTILE = "bad\nerror: all is well\x1b[2J\x1b]0;owned\x07\u202e\x9b\udcff"
SHOWN = r"bad\nerror: all is well\x1b[2J\x1b]0;owned\x07\u202e\x9b\udcff"


def test_names_are_shown_as_text(root: Path) -> None:
    """Of files and of classes, in errors and in warnings."""
    (root / "class00").rename(root / HOSTILE)
    (root / HOSTILE / f"{HOSTILE}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError) as raised:
        folder_tables(root, 8)
    assert f"{SHOWN}/{SHOWN}.png" in str(raised.value) and str(raised.value).isprintable()
    with pytest.warns(UserWarning) as told:
        folder_tables(root, 8, skip_unreadable=True)
    assert f"{SHOWN}.png" in str(told[0].message) and str(told[0].message).isprintable()
    for path in (root / HOSTILE).iterdir():
        path.unlink()
    for seed in range(12):  # in whichever mode the class is
        with pytest.raises(ValueError, match="got none in bad") as raised:
            get_tasksets("folder", root=root, split_seed=seed, train_ways=2, train_samples=1,
                         test_ways=1, test_samples=1)
        assert str(raised.value).isprintable()


def test_a_class_name_in_two_modes_is_shown_as_text(root: Path) -> None:
    names = sorted(path for path in root.iterdir())
    for number, mode in enumerate(("train", "validation", "test")):
        (root / mode).mkdir()
        for path in names[number::3]:
            path.rename(root / mode / path.name)
    for mode in ("train", "test"):
        next((root / mode).iterdir()).rename(root / mode / HOSTILE)
    with pytest.warns(UserWarning) as told:
        folder_tables(root, 8)
    assert SHOWN in str(told[0].message) and str(told[0].message).isprintable()


MEASURE = """
import sys
from pathlib import Path
from l2l_implicit.tasks.pictures import read_square

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

for name in sys.argv[1:]:
    read_square(Path("small", name), 8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from here on
    before = peak()
    read_square(Path("large", name), 8)
    print(name, peak() - before)
"""
EXIF = Image.Exif()
EXIF[0x0112] = 6
DEFLATED = {"compression": "tiff_deflate"}
LARGE: dict[str, tuple[str, str, dict[str, object]]] = {
    "deep PNG": ("I;16", "png", {}),
    "deep TIFF": ("I", "tiff", DEFLATED),
    "floats": ("F", "tiff", DEFLATED),
    "grey and alpha": ("LA", "png", {}),
    "palette": ("P", "png", {"transparency": 0}),
    "four colours": ("CMYK", "tiff", DEFLATED),
    "turned": ("RGB", "jpeg", {"exif": EXIF}),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's own")
def test_memory_is_a_few_bytes_a_pixel(tmp_path: Path) -> None:
    """The decoded picture, a square of 4 bytes a pixel, and where it is turned another."""
    side = 2000
    assert side**2 < FEW_PIXELS  # so that it is read, however small the file
    for folder, length in (("small", 16), ("large", side)):
        (tmp_path / folder).mkdir()
        for name, (mode, format, options) in LARGE.items():
            image = Image.new(mode, (length, length))
            image.save(tmp_path / folder / name, format=format, **options)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run([sys.executable, "-c", MEASURE, *LARGE], cwd=tmp_path, check=True,
                            env=environment, capture_output=True, text=True)  # fmt: skip
    found = dict(line.rsplit(" ", 1) for line in answer.stdout.splitlines())
    assert list(found) == list(LARGE)
    assert all(int(taken) <= 15 * side**2 for taken in found.values()), found


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    """As Pillow turns the whole picture."""
    pixels = np.random.RandomState(0).randint(0, 256, (12, 8, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found, _ = read_square(tmp_path / "turned.png", 8)
    with Image.open(tmp_path / "turned.png") as opened:
        whole = np.asarray(ImageOps.exif_transpose(opened))
    top, left = (whole.shape[0] - 8) // 2, (whole.shape[1] - 8) // 2
    expected = whole[top : top + 8, left : left + 8].transpose(2, 0, 1)
    assert np.array_equal(found, expected)


def test_strips_meet_without_a_seam(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    pixels = np.random.RandomState(0).randint(0, 65536, (21, 30)).astype(np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    whole = read_square(tmp_path / "deep.png", 7)
    monkeypatch.setattr("l2l_implicit.tasks.pictures.STRIP", 50)  # two rows
    strips = read_square(tmp_path / "deep.png", 7)
    assert np.array_equal(whole[0], strips[0]) and whole[1] and strips[1]


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 6), (level, 0, 0)) for level in (40, 250)]
    for format in ("gif", "png", "webp"):
        options = {"lossless": True} if format == "webp" else {}
        frames[0].save(tmp_path / format, format=format, save_all=True, append_images=frames[1:],
                       **options)  # fmt: skip
        assert read_square(tmp_path / format, 3)[0][0].tolist() == [[40] * 3] * 3


def test_a_kept_file_that_is_no_such_file_is_made_anew(root: Path) -> None:
    first = folder_tables(root, 8)["train"].images
    kept = root / ".reduced_8.npz"
    whole = kept.read_bytes()
    for damage in (b"", b"no archive", whole[:-40], whole.replace(b"\x93NUMPY", b"\x93LUMPY")):
        kept.write_bytes(damage)
        assert (folder_tables(root, 8)["train"].images == first).all()
    with np.load(kept) as stored:
        arrays = dict(stored)
    arrays["images"][:] = 0
    np.savez_compressed(kept, **arrays)  # not ours: it may be far larger than it looks
    assert (folder_tables(root, 8)["train"].images == first).all()
