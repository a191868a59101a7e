"""One picture of any kind that Pillow reads, as a square of uint8 pixels."""

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", *DEEP)
# What Pillow's readers raise on files that are no pictures, cut short, or altered.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_square(path: Path, size: int) -> tuple[NDArray[np.uint8], bool]:
    """The central square of a picture, bilinearly resized, and whether the picture is grey.

    It is turned as its EXIF orientation says; what is transparent becomes white; of several frames
    the first is taken. Deep grey levels (16 bit) are reduced to 8 bit.

    Args:
        path: file in any format that Pillow reads.
        size: side of the result in pixels.

    Returns:
        uint8 RGB [3, size, size] (grey: three equal channels), and True where the mode is grey.

    Raises:
        ValueError: the file cannot be read as a picture; the message names it.
    """
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            return central_square(_as_rgb(picture), size), picture.mode in GREY
    except UNREADABLE as error:
        reason = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
        raise ValueError(
            f"expected a picture that Pillow reads in {path}, got {reason}: remove or replace it, "
            "or pass skip_unreadable=True"
        ) from error


def central_square(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central square of an RGB picture, bilinearly resized: uint8 [3, size, size]."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    # Cropped first: resize(box=...) would mix in pixels from outside the square.
    central = picture.crop((left, top, left + side, top + side))
    reduced = central.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(reduced).transpose(2, 0, 1).copy()


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in DEEP:
        picture = _eight_bits(picture)
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        opaque = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(opaque, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255: nearly every 16-bit picture would come out white."""
    levels = np.asarray(picture, np.float64)
    highest = 1.0 if picture.mode == "F" else 65535.0
    return Image.fromarray((255 * levels / highest).round().clip(0, 255).astype(np.uint8))
