"""Pictures on disk: one of any kind as a square of pixels, and many kept reduced for next time."""

import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from l2l_implicit.checks import printable

Arrays = dict[str, NDArray]
Image.init()
# Not those that start a program (EPS), nor those that hold a picture of another size than they say
# (ICO, ICNS, IPTC, BLP).
COMMON = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
FORMATS: list[str] = [name for name in COMMON if name in Image.OPEN]
FEW_PIXELS, PIXELS_A_BYTE = 2**24, 100  # a larger picture has no more pixels a byte of its file
TILE, WHITE, SIGN = (322, 323), 262, 339  # TIFF's tags: a tile's sides, 0 if white is 0, 2: signed
STRIP = 2**18  # pixels that are converted at a time


def read_square(path: Path, size: int) -> tuple[NDArray[np.uint8], bool]:
    """The central square of a picture, bilinearly resized, and whether the picture is grey.

    It is turned as its EXIF orientation says; what is transparent becomes white; of several frames
    the first is taken. Deep levels (16 bit) are reduced to 8 bit, and must reach 4096 of 65535.
    Memory: a few bytes a pixel, beside what the decoder needs.

    Args:
        path: regular file in one of `FORMATS`, whatever its name.
        size: side of the result in pixels.

    Returns:
        uint8 RGB [3, size, size] (grey: three equal channels), and True where the mode is grey.

    Raises:
        ValueError: the file cannot be read as a picture; the message names it.
    """
    with opened(path) as picture:
        square, grey = _central_square(picture), Image.getmodebase(picture.mode) == "L"
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1)
        picture.close()  # frees its pixels
        square.getexif()[ExifTags.Base.Orientation] = turned
        ImageOps.exif_transpose(square, in_place=True)
        reduced = square.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(reduced).transpose(2, 0, 1).copy(), grey


@contextmanager
def opened(path: Path, stored: bytes | None = None) -> Iterator[Image.Image]:
    """A picture, not decoded yet; whatever goes wrong within is a ValueError that names it.

    With its content ``stored`` in memory ``path`` is a name only.
    """
    source = str(path) if stored is None else io.BytesIO(stored)
    try:
        if stored is None and not path.is_file():  # opening a FIFO would wait
            raise OSError("no regular file")
        with Image.open(source, formats=FORMATS) as picture:
            tags = getattr(picture, "tag_v2", {})  # of a TIFF, whose tiles are decoded as a whole
            sides = zip(picture.size, TILE, strict=True)
            width, height = (max(side, tags.get(tag, 0)) for side, tag in sides)
            length = path.stat().st_size if stored is None else len(stored)
            if width * height > max(FEW_PIXELS, PIXELS_A_BYTE * length):
                raise ValueError(f"{width} x {height} pixels in {length} bytes")
            clear = str(picture.tile) if "transparency" in picture.info else ""
            if (
                (picture.mode[0] in "IF" and tags.get(WHITE) == 0)
                or (picture.mode == "L" and 2 in tags.get(SIGN, ()))
                or any(kind in clear for kind in ("'L;2'", "'L;4'", "RGB;16"))
            ):
                raise ValueError("levels that it misreads (save it with 8 bit)")
            yield picture
    except Exception as error:  # Pillow's readers raise whatever a damaged file makes them raise
        reason = str(error).replace(repr(source), "it").replace(str(path), "it")
        raise ValueError(
            f"expected a picture that Pillow reads in {printable(path)}, got "
            f"{printable(' '.join(reason.split())) or type(error).__name__}: remove or replace it"
        ) from error


def _central_square(picture: Image.Image) -> Image.Image:
    """The central square as RGB, converted strip by strip: deep levels take 16 bytes on the way.

    It is cut out before it is resized: `resize(box=...)` would mix in pixels from beside it.
    """
    side, highest, grey, kind = min(picture.size), 0, picture.mode[0] == "I", str(picture.tile)
    deep = grey or ";16" in kind or ", 65535)" in kind  # of colours Pillow keeps the upper 8 bit
    left, top = ((length - side) // 2 for length in picture.size)
    square, rows = Image.new("RGB", (side, side)), max(1, STRIP // side)
    for row in range(0, side, rows):
        last = min(row + rows, side)
        strip = picture.crop((left, top + row, left + side, top + last))
        if deep:
            levels = np.asarray(strip if grey else strip.convert("RGB"))  # whatever is transparent
            highest = max(highest, int(levels.max()) * (1 if grey else 255))
        square.paste(_as_rgb(strip), (0, row))
    if 0 < highest < 4096:  # pixels of 8 or 12 bit in a deeper file
        raise ValueError(f"levels up to {highest} of 65535, nearly black (stretch them to 65535)")
    return square


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode[0] in "IF":  # Pillow clips at 255: nearly every such picture would be white
        highest = 1.0 if picture.mode == "F" else 65535.0
        levels = np.asarray(picture, np.float64)
        if not (levels.min() >= 0 and levels.max() <= highest):  # nan: neither
            raise ValueError(
                f"levels from {levels.min():g} to {levels.max():g} instead of 0 to {highest:g}"
            )
        reduced = (255 * levels / highest).round().astype(np.uint8)
        reduced[levels == picture.info.get("transparency", -1)] = 255
        picture = Image.fromarray(reduced)
    if picture.has_transparency_data:
        opaque = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(opaque, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def kept_arrays(kept: Path, listing: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of an earlier call if they were made from the same files, else made now and kept.

    Args:
        kept: .npz file; where it cannot be written the arrays are made anew at every start.
        listing: digest of the files that `make` reads, see `listing_of`.
        make: the arrays by name.
    """
    # What is absent, damaged, or would be larger in memory than on disk is made anew.
    with suppress(Exception):
        if kept.is_file():
            with np.load(kept, allow_pickle=False) as stored:
                packed = any(entry.compress_type for entry in stored.zip.infolist())
                whole = not packed and stored.zip.testzip() is None
                if whole and str(stored["listing"]) == listing:
                    return {name: stored[name] for name in stored.files if name != "listing"}
    arrays = make()
    # Under a temporary name first: another process never reads half a file.
    draft = kept.with_suffix(f".{secrets.token_hex(4)}.tmp")
    with suppress(OSError):  # not writable, or a full disk: the next start makes them again
        file = draft.open("xb")  # nobody else's, and no link
        try:
            with file:
                np.savez(file, **arrays, listing=np.array(listing))
            os.replace(draft, kept)
        finally:
            draft.unlink(missing_ok=True)
    return arrays


def listing_of(paths: Sequence[Path], folder: Path, times: bool = False) -> str:
    """Digest of the files' names and sizes, and of when they were changed: another, another file.

    Args:
        paths: files below `folder`.
        folder: where names start.
        times: whether the time of the last change counts; a copy to elsewhere may change it.
    """
    total = hashlib.sha256()
    for path in paths:
        stamp: tuple[int, ...] = ()
        with suppress(OSError):  # a link to nowhere, say: reading it will tell
            found = path.stat()
            stamp = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)[: 3 if times else 1]
        total.update(os.fsencode(f"{path.relative_to(folder).as_posix()} {stamp}\n"))
    return total.hexdigest()
