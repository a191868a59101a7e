"""From a face to bitmaps: every candidate character, cropped, fitted and centred in 28 x 28."""

import io
import unicodedata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFont

from experiments.build_glyphs.faces import Face

SIDE = 28  # pixels of the image
FIT = 22  # pixels of the glyph's longer side
RENDERED_SIZE = 72  # points at which FreeType draws, before the reduction to FIT
INK = 40  # grey value from which a pixel counts as ink when the margins are cut

# Blocks with letters, digits, punctuation and symbols (not emoji, not right-joining scripts).
BLOCKS = (
    (0x21, 0x7E), (0xA1, 0x24F), (0x250, 0x2AF), (0x370, 0x3FF), (0x400, 0x52F), (0x531, 0x589),
    (0x10A0, 0x10FF), (0x5D0, 0x5EA), (0xE01, 0xE2E), (0x904, 0x939), (0x1E00, 0x1EFF),
    (0x2010, 0x205E), (0x20A0, 0x20C0), (0x2100, 0x214F), (0x2190, 0x23FF), (0x2500, 0x26FF),
    (0x2701, 0x27BF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF),
)
CATEGORIES = {"Lu", "Ll", "Lo", "Lt", "Nd", "No", "Sm", "Sc", "So", "Po", "Ps", "Pe", "Pd"}


@dataclass(frozen=True)
class Renderings:
    """Bitmaps [n, 28, 28] uint8 with the code point and the index of the face of each."""

    images: NDArray[np.uint8]
    codepoints: NDArray[np.int64]
    faces: NDArray[np.int64]


def candidates() -> list[int]:
    """Code points that may become classes: one visible character each, not composed of others."""
    points = (point for first, last in BLOCKS for point in range(first, last + 1))
    return [
        point for point in points
        if unicodedata.category(chr(point)) in CATEGORIES
        and len(unicodedata.normalize("NFKD", chr(point))) == 1
    ]


def render_all(faces: list[Face]) -> Renderings:
    """Every candidate in every face that has it, without blanks and .notdef boxes."""
    images, codepoints, indices = [], [], []
    wanted = candidates()
    for index, face in enumerate(faces):
        font = load_font(face)
        missing = draw(font, "\U0010fffd")  # a private code point: the face's .notdef box
        for point in wanted:
            if point not in face.codepoints:
                continue
            image = draw(font, chr(point))
            if image is None or (missing is not None and np.array_equal(image, missing)):
                continue
            images.append(image)
            codepoints.append(point)
            indices.append(index)
    return Renderings(np.stack(images), np.array(codepoints), np.array(indices))


def load_font(face: Face) -> ImageFont.FreeTypeFont:
    """The face at the size it is drawn in, with its axes set."""
    basic = ImageFont.Layout.BASIC  # the other layout depends on a library of the machine
    font = ImageFont.truetype(io.BytesIO(face.data), RENDERED_SIZE, layout_engine=basic)
    if face.axes:
        font.set_variation_by_axes(list(face.axes))
    return font


def draw(font: ImageFont.FreeTypeFont, character: str) -> NDArray[np.uint8] | None:
    """The character as uint8 [28, 28], or None where it leaves no ink."""
    mask = font.getmask(character, mode="L")
    width, height = mask.size
    grey = np.frombuffer(bytes(mask), np.uint8).reshape(height, width)
    rows, columns = np.flatnonzero((grey > INK).any(1)), np.flatnonzero((grey > INK).any(0))
    if not len(rows):
        return None
    return _centred(grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _centred(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = grey.shape
    factor = FIT / max(height, width)
    height, width = max(1, round(height * factor)), max(1, round(width * factor))
    smoothing = Image.Resampling.BOX if factor < 0.5 else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(grey).resize((width, height), smoothing))
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    image[top : top + height, left : left + width] = small
    return image
