"""What lies among the pictures of a class and is none: an error with its name, or left out."""

import io
import os
import secrets
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from disk_formats import photographs, write_classes
from PIL import Image, ImageOps
from pytest import MonkeyPatch

from l2l_implicit.tasks import folder_tables, get_tasksets
from l2l_implicit.tasks.pictures import FEW_PIXELS, listing_of, read_square

ROOT = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twelve classes of three small pictures."""
    write_classes(tmp_path, 12)
    return tmp_path


def tiff(levels: object) -> bytes:
    return encoded(Image.fromarray(np.full((4, 4), levels)), "tiff")


def encoded(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=format, **options)
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


def png(side: int, depth: int, rows: bytes = b"", kind: int = 0, *more: tuple) -> bytes:
    header = struct.pack(">IIBBBBB", side, side, depth, kind, 0, 0, 0)
    chunks = (b"IHDR", header), *more, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")
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


def tiled(side: int) -> bytes:
    """A TIFF of 9 x 9 pixels in one tile, which would be unpacked as a whole."""
    entries = {256: 9, 257: 9, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: 9}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)


NO_PICTURES: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "socket": (bound_socket, "got no regular file"),
    "device": (link("/dev/zero"), "got no regular file"),
    "link to nowhere": (link("nowhere.png"), "got no regular file"),
    "folder": (Path.mkdir, "found the folder"),
    "nothing": (Path.touch, "cannot identify image file it"),
    "text": (b"no picture", "cannot identify"),
    "icon": (icon(), "cannot load"),  # it could be a TGA
    "unknown DDS": (dds(b"ABCD"), ""), "half a JPEG": (half("jpeg"), "truncated"),
    **{f"half a {format}": (half(format), "") for format in ("png", "webp", "tiff")},
    "header of a large PNG": (png(50_000, 8), "exceeds limit of"),
    "large and small": (png(9000, 1, bytes(1126 * 9000)), r"9000 x 9000 pixels in \d+ by"),
    "a large tile": (tiled(30_000), "30000 x 30000 pixels in 134 bytes"),
    "levels of 32 bit": (tiff(np.int32(70_000)), "instead of 0 to 65535"),
    "pixels of 12 bit": (tiff(np.uint16(4095)), "levels up to 4095 of 65535"),
    "colours of 12 bit": (png(4, 16, (b"\0" + b"\x0f\xff" * 12) * 4, 2), "up to 3825 of 65535"),
    "PPM of 12 bit": (b"P6 4 4 65535\n" + b"\x0f\xff" * 48, "levels up to 4080 of 65535"),
    "a transparent level of 2 bit": (png(4, 2, b"\0\x1b" * 4, 0, (b"tRNS", b"\0\1")), "misreads"),
    "white is 0": (tiff(np.uint16(5000)).replace(*(struct.pack("<HHIH", 262, 3, 1, n)
                                                   for n in (1, 0))), "levels that it misreads"),
    "levels with a sign": (encoded(Image.new("L", (4, 4)), "tiff", tiffinfo={339: 2}), "misreads"),
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


@pytest.mark.parametrize("ask", ["builtins.open", "os.stat"])
def test_a_file_that_may_not_be_read(ask: str, root: Path, monkeypatch: MonkeyPatch) -> None:
    """As for anybody but root, who reads everything."""
    path, real = root / "class03" / "1.png", {"os.stat": os.stat}.get(ask, open)

    def refuse(file: object, *arguments: object, **options: object) -> object:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **options)

    monkeypatch.setattr(ask, refuse)
    with pytest.raises(ValueError, match="class03/1.png, got .*Permission denied: it: remove"):
        folder_tables(root, 8)


def test_a_folder_that_may_not_be_listed(root: Path, monkeypatch: MonkeyPatch) -> None:
    (root / "class00").rename(root / "train")
    real = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name == "train":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ValueError, match=r"got .*train \(Permission denied\): mend or remove it"):
        folder_tables(root, 8)


def test_what_is_in_no_class_or_in_two_spellings_is_told(root: Path) -> None:
    (root / "class00").rename(root / "E\u0301")
    (root / "class01").rename(root / "\u00e9")
    (root / "README").touch()
    (root / "loose.PNG").touch()
    with pytest.warns(UserWarning) as told:
        tables = folder_tables(root, 8)
    assert sum(map(len, tables.values())) == 36
    unread, twice = (str(warning.message) for warning in told)
    assert unread.endswith("1 entries are in no class; not read: " + str(root / "loose.PNG"))
    assert "1 classes have one name in two" in twice and "two spellings (\u00e9)" in twice
    for mode in ("train", "validation", "test"):
        (root / mode).mkdir()
        next(root.glob("class*")).rename(root / mode / mode)
    with pytest.warns(UserWarning, match="9 entries are in no class; not read: "):
        assert len(folder_tables(root, 8)["train"]) == 3


@pytest.mark.parametrize("error", [MemoryError, NotImplementedError])
def test_whatever_the_reader_raises(error: type, root: Path, monkeypatch: MonkeyPatch) -> None:
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
    fewer = whole.replace(b", 3, 8, 8)", b", 1, 8, 8)")  # still an array
    assert fewer != whole
    other = whole.replace(b"\x93NUMPY", b"\x93LUMPY")
    for damage in (b"", b"no archive", whole[:-40], other, fewer):
        kept.write_bytes(damage)
        assert (folder_tables(root, 8)["train"].images == first).all()
    with np.load(kept) as stored:
        arrays = dict(stored)
    arrays["images"][:] = 0
    np.savez_compressed(kept, **arrays)  # not ours: it may be far larger than it looks
    assert (folder_tables(root, 8)["train"].images == first).all()


def test_no_link_is_written_through_and_none_removed(root: Path, monkeypatch: MonkeyPatch) -> None:
    other, link = root.parent / "other", root / ".reduced_8.guess.tmp"
    other.write_text("other")
    link.symlink_to(other)
    monkeypatch.setattr(secrets, "token_hex", lambda size: "guess")
    folder_tables(root, 8)
    assert link.is_symlink() and other.read_text() == "other"
    assert not (root / ".reduced_8.npz").exists()
