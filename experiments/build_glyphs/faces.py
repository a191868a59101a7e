"""The typefaces: every face of the pinned packages, with its family and its licence."""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions, version
from importlib.util import find_spec
from pathlib import Path

from fontTools.ttLib import TTFont

# Fonts of placeholders and bracket pieces, of music, and of TeX encodings that are no Unicode.
# Ubuntu's are left out because their licence is not a widely accepted free one; no class is lost.
SKIPPED = re.compile(r"LastResort|STIXSiz|STIXNonUni|^cm[a-z]+10|NotoMusic|Ubuntu")
WEIGHTS = (300.0, 400.0, 700.0)  # instances taken of a variable font: light, regular, bold


@dataclass(frozen=True)
class Face:
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
    sources = sorted(_sources(), key=lambda source: (source[0], source[1]))
    return [face for source in sources for face in _faces_of(*source)]


def _sources() -> Iterator[tuple[str, str, bytes]]:
    """(package, file name, font bytes) of every font file that is used."""
    for package, path in _font_files():
        if not SKIPPED.search(path.name):
            yield package, path.name, path.read_bytes()
    import pymupdf_fonts  # fonts stored as base64 in Python modules

    for code, described in pymupdf_fonts.fontdescriptors.items():
        name = f"{described['name'].replace(' ', '')}-{code}"
        if not SKIPPED.search(name):
            yield "pymupdf-fonts", name, pymupdf_fonts.myfont(code)


def _font_files() -> Iterator[tuple[str, Path]]:
    folder = _package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    yield from (("matplotlib", path) for path in folder.glob("*.ttf"))
    for name in {distribution.metadata["Name"] for distribution in distributions()}:
        if name.startswith("fontpkg-"):
            files = _package_folder(name.replace("-", "_")) / "files"
            yield from ((name, path) for path in files.glob("*.ttf"))


def _package_folder(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"expected the typeface package {module!r}, found none: install "
            "experiments/build_glyphs/requirements.txt into a fresh environment"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _faces_of(package: str, name: str, data: bytes) -> Iterator[Face]:
    font = TTFont(io.BytesIO(data), lazy=True)
    family = _name(font, 16) or _name(font, 1) or name
    style = _name(font, 17) or _name(font, 2)
    italic = bool(re.search("italic|oblique", style, re.I))
    codepoints = frozenset(font.getBestCmap() or {})
    copyright_line = " ".join(_name(font, 0).split())
    licence = _licence(package, family)
    for weight, axes in _instances(font):
        yield Face(family, style, weight, italic, axes, data, codepoints, package,
                   version(package), licence, copyright_line)


def _name(font: TTFont, name_id: int) -> str:
    return (font["name"].getDebugName(name_id) or "").strip()


def _instances(font: TTFont) -> list[tuple[int, tuple[float, ...]]]:
    """(weight, axis values): one for a static font, one per weight within range for a variable."""
    if "fvar" not in font:
        return [(int(font["OS/2"].usWeightClass), ())]
    axes = font["fvar"].axes
    weight = next(axis for axis in axes if axis.axisTag == "wght")
    within = [w for w in WEIGHTS if weight.minValue <= w <= weight.maxValue]
    return [
        (int(w), tuple(w if axis is weight else axis.defaultValue for axis in axes))
        for w in within
    ]


def _licence(package: str, family: str) -> str:
    if package == "matplotlib" and family.startswith("DejaVu"):
        return "Bitstream Vera, DejaVu"
    if package in ("matplotlib", "pymupdf-fonts"):  # STIX, Fira, Noto, Space Mono, Cascadia
        return "OFL-1.1"
    described = _package_folder(package.replace("-", "_")) / "metadata.json"
    return json.loads(described.read_text(encoding="utf-8"))["license"]
