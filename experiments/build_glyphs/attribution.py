"""GLYPHS_ATTRIBUTION.md: every family that was drawn, its package, licence and copyright line."""

from experiments.build_glyphs.faces import Face

HEADER = """# Typefaces drawn in glyphs.npz

`glyphs.npz` holds 28 x 28 pixel pictures of characters, drawn from the typefaces below. It holds
no font: no outlines, no metrics, no tables. This file is written by
`python -m experiments.build_glyphs`.

- OFL-1.1: SIL Open Font License 1.1, <https://openfontlicense.org>. It does not apply to what is
  made with the fonts.
- Apache-2.0: <https://www.apache.org/licenses/LICENSE-2.0>.
- Bitstream Vera, DejaVu: the file LICENSE_DEJAVU beside the fonts in matplotlib.

| family | faces | package | licence | copyright |
|---|---|---|---|---|
"""


def attribution(faces: list[Face]) -> str:
    """The whole file as Markdown, one row a family, in alphabetical order."""
    families: dict[tuple[str, ...], int] = {}
    for face in faces:
        package = f"{face.package} {face.version}"
        row = (face.family, package, face.licence, face.copyright.replace("|", "/"))
        families[row] = families.get(row, 0) + 1
    rows = [
        f"| {family} | {count} | {package} | {licence} | {owner or '(none in the font)'} |"
        for (family, package, licence, owner), count in sorted(families.items())
    ]
    return HEADER + "\n".join(rows) + "\n"
