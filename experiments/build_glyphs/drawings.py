"""The typefaces of the pinned packages, and their characters as bitmaps: every candidate, cropped,
fitted and centred in 28 x 28."""

import io
import json
import re
import unicodedata
from collections.abc import Iterator
from importlib.metadata import distributions, version
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageFont

# Fonts of placeholders and bracket pieces, of music, and of TeX encodings that are no Unicode.
# Ubuntu's are left out because their licence is not a widely accepted free one; no class is lost.
SKIPPED = re.compile(r"LastResort|STIXSiz|STIXNonUni|^cm[a-z]+10|NotoMusic|Ubuntu")
WEIGHTS = (300.0, 400.0, 700.0)  # instances taken of a variable font: light, regular, bold
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


class Face(NamedTuple):
    """One face: font bytes, the values of its axes (variable fonts only) and where it is from."""

    family: str
    style: str
    weight: int
    italic: bool
    axes: tuple[float, ...]
    data: bytes
    codepoints: frozenset[int]
    package: str
    version: str
    licence: str
    copyright: str

    @property
    def preference(self) -> tuple[int, int]:
        """Order inside a family: regular, bold, italic, bold italic, then the other weights."""
        usual = {(400, False): 0, (700, False): 1, (400, True): 2, (700, True): 3}
        return usual.get((self.weight, self.italic), 4 + self.italic), abs(self.weight - 400)


def all_faces() -> list[Face]:
    """Every face of the installed packages, in an order that does not depend on the machine."""
    sources = sorted(_sources(), key=lambda source: source[:2])
    kept = (source for source in sources if not SKIPPED.search(source[1]))
    return [face for source in kept for face in _faces_of(*source)]


def _sources() -> Iterator[tuple[str, str, bytes]]:
    """(package, file name, font bytes) of every font file."""
    folders = {"matplotlib": _package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"}
    for name in {distribution.metadata["Name"] for distribution in distributions()}:
        if name.startswith("fontpkg-"):
            folders[name] = _package_folder(name) / "files"
    for name, folder in folders.items():
        yield from ((name, path.name, path.read_bytes()) for path in folder.glob("*.ttf"))
    import pymupdf_fonts  # fonts stored as base64 in Python modules

    for code, described in pymupdf_fonts.fontdescriptors.items():
        name = f"{described['name'].replace(' ', '')}-{code}"
        yield "pymupdf-fonts", name, pymupdf_fonts.myfont(code)


def _package_folder(package: str) -> Path:
    return Path(str(files(package.replace("-", "_"))))


def _faces_of(package: str, name: str, data: bytes) -> Iterator[Face]:
    font = TTFont(io.BytesIO(data), lazy=True)
    family = _name(font, 16) or _name(font, 1) or name
    style = _name(font, 17) or _name(font, 2)
    italic = bool(re.search("italic|oblique", style, re.I))
    rest = (data, frozenset(font.getBestCmap() or {}), package, version(package),
            _licence(package, family), " ".join(_name(font, 0).split()))  # fmt: skip
    for weight, axes in _instances(font):
        yield Face(family, style, weight, italic, axes, *rest)


def _name(font: TTFont, name_id: int) -> str:
    return (font["name"].getDebugName(name_id) or "").strip()


def _instances(font: TTFont) -> list[tuple[int, tuple[float, ...]]]:
    """(weight, axis values): one for a static font, one per weight within range for a variable."""
    if "fvar" not in font:
        return [(int(font["OS/2"].usWeightClass), ())]
    axes = font["fvar"].axes
    weight = next(axis for axis in axes if axis.axisTag == "wght")
    return [
        (int(w), tuple(w if axis is weight else axis.defaultValue for axis in axes))
        for w in WEIGHTS
        if weight.minValue <= w <= weight.maxValue
    ]


def _licence(package: str, family: str) -> str:
    if package == "matplotlib" and family.startswith("DejaVu"):
        return "Bitstream Vera, DejaVu"
    if package in ("matplotlib", "pymupdf-fonts"):  # STIX, Fira, Noto, Space Mono, Cascadia
        return "OFL-1.1"
    described = _package_folder(package) / "metadata.json"
    return json.loads(described.read_text(encoding="utf-8"))["license"]


class Renderings(NamedTuple):
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
    found, wanted = [], candidates()
    for index, face in enumerate(faces):
        font = load_font(face)
        missing = draw(font, "\U0010fffd")  # a private code point: the face's .notdef box
        for point in (point for point in wanted if point in face.codepoints):
            image = draw(font, chr(point))
            if image is not None and not np.array_equal(image, missing):
                found.append((image, point, index))
    return Renderings(*(np.array(column) for column in zip(*found, strict=True)))


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
    grey = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1])
    rows, columns = np.flatnonzero((grey > INK).any(1)), np.flatnonzero((grey > INK).any(0))
    if not len(rows):
        return None
    grey = grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    factor = FIT / max(grey.shape)
    height, width = (max(1, round(side * factor)) for side in grey.shape)
    smoothing = Image.Resampling.BOX if factor < 0.5 else Image.Resampling.BILINEAR
    image = np.zeros((SIDE, SIDE), np.uint8)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    image[top : top + height, left : left + width] = np.asarray(
        Image.fromarray(grey).resize((width, height), smoothing)
    )
    return image
