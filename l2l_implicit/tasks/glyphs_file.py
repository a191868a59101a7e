"""Reads the embedded array of glyphs and checks that it is the one this version was made with."""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PATH = Path(__file__).with_name("glyphs.npz")
# Of the decompressed arrays, see `digest`.
SHA256 = "3f62fec7b65f16d5dee262997dcfb5a3296edf8700f41c80a01dc89b26955baf"
REMEDY = "reinstall the package: pip install --force-reinstall --no-deps l2l-implicit"


@lru_cache(maxsize=1)
def glyph_arrays() -> dict[str, NDArray]:
    """The verified arrays of `glyphs.npz`, read once per process. Treat them as read-only.

    Returns:
        `images` uint8 [n, 28, 28]; `labels` [n] class indices; `faces` [n] face indices;
        `codepoints` and `scripts` by class; `face_families`, `face_styles`, `face_packages` and
        `face_licences` by face; `split_{random,script}_{train,validation,test}` class indices.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is truncated, or its contents are not the expected ones.
    """
    return load(PATH)


def load(path: Path) -> dict[str, NDArray]:
    """Reads and verifies one file; raises as `glyph_arrays` does."""
    arrays = read(path)
    found = digest(arrays)
    if found != SHA256:
        raise ValueError(
            f"expected glyph arrays with SHA-256 {SHA256} in {path}, got {found}: {REMEDY}"
        )
    for array in arrays.values():
        array.setflags(write=False)  # shared by every data set of the process
    return arrays


def read(path: Path) -> dict[str, NDArray]:
    """The arrays of the file, unverified."""
    if not path.is_file():
        raise FileNotFoundError(f"expected the glyph images at {path}, found no file: {REMEDY}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"expected a complete array file at {path}, got {size} bytes that do not unpack "
            f"({error}): {REMEDY}"
        ) from error


def digest(arrays: Mapping[str, NDArray]) -> str:
    """SHA-256 over name, type, shape and bytes of every array: independent of the compression."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(array.data)
    return total.hexdigest()
