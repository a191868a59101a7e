"""Pictures on disk: one of any kind as a square of pixels, and many kept reduced for next time."""

import hashlib
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Arrays = dict[str, NDArray]
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", *DEEP)
# What Pillow's readers raise on files that are no pictures, cut short, or altered.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError,
              struct.error, zlib.error, Image.DecompressionBombError)


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
    if picture.mode in DEEP:  # Pillow clips at 255: nearly every such picture would be white
        highest = 1.0 if picture.mode == "F" else 65535.0
        levels = 255 * np.asarray(picture, np.float64) / highest
        picture = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
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
    # A file that is absent, or cut short by a crash, is made anew.
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(kept, allow_pickle=False) as stored:
            if str(stored["listing"]) == listing:
                return {name: stored[name] for name in stored.files if name != "listing"}
    arrays = make()
    # Under a temporary name first: another process never reads half a file.
    draft = kept.with_suffix(f".{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            np.savez(file, **arrays, listing=np.array(listing))
        os.replace(draft, kept)
    except OSError:  # not writable, or a full disk: the next start makes them again
        with suppress(OSError):
            draft.unlink()
    return arrays


def listing_of(paths: Sequence[Path], folder: Path, times: bool = False) -> str:
    """Digest of the files' names and sizes, and of when they were changed: another, another file.

    Args:
        paths: files below `folder`.
        folder: where names start.
        times: whether the time of the last change counts; a copy to elsewhere may change it.
    """
    lines = [f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths]
    if times:
        lines += [str(path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
