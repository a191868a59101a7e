"""Draws characters in the installed typefaces, and writes glyphs.npz with its attribution."""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.build_glyphs import classes
from experiments.build_glyphs.drawings import Face, all_faces, render_all

TASKS = Path(__file__).parents[2] / "l2l_implicit" / "tasks"
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


def build() -> tuple[dict[str, NDArray], list[Face]]:
    """The arrays of the file, and the faces that they use."""
    faces = all_faces()
    drawn = render_all(faces)
    chosen = classes.eligible_classes(drawn, faces)
    points = classes.merge(chosen, drawn, faces)
    rows = np.concatenate([sorted(chosen[point]) for point in points])
    used, face = np.unique(drawn.faces[rows], return_inverse=True)
    faces = [faces[index] for index in used]
    scripts = [classes.script_of(point) for point in points]
    arrays = {
        "images": drawn.images[rows],
        "labels": np.searchsorted(points, drawn.codepoints[rows]).astype(np.int16),
        "codepoints": np.array(points, np.int32),
        "scripts": np.array(scripts),
        "faces": face.astype(np.int16),
        "face_families": np.array([face.family for face in faces]),
        "face_styles": np.array([f"{face.style} {face.weight}" for face in faces]),
        "face_packages": np.array([f"{face.package} {face.version}" for face in faces]),
        "face_licences": np.array([face.licence for face in faces]),
    }
    splits = {"random": classes.random_split(len(points)), "script": classes.script_split(scripts)}
    for split, modes in splits.items():
        for mode, indices in modes.items():
            arrays[f"split_{split}_{mode}"] = np.array(indices, np.int16)
    return arrays, faces


def attribution(faces: list[Face]) -> str:
    """GLYPHS_ATTRIBUTION.md as Markdown, one row a family, in alphabetical order."""
    families = Counter((face.family, f"{face.package} {face.version}", face.licence,
                        face.copyright.replace("|", "/")) for face in faces)  # fmt: skip
    return HEADER + "".join(
        f"| {family} | {count} | {package} | {licence} | {owner or '(none in the font)'} |\n"
        for (family, package, licence, owner), count in sorted(families.items())
    )


def main() -> None:
    """Command line: writes the array and its attribution, and reports what they hold."""
    parser = argparse.ArgumentParser("python -m experiments.build_glyphs", description=__doc__)
    parser.add_argument("--out", type=Path, default=TASKS / "glyphs.npz", help="array to write")
    options = parser.parse_args()
    arrays, faces = build()
    np.savez_compressed(options.out, **arrays)
    owners = options.out.with_name("GLYPHS_ATTRIBUTION.md")
    owners.write_text(attribution(faces), encoding="utf-8")
    print(f"{len(arrays['codepoints'])} classes", dict(Counter(arrays["scripts"].tolist())))
    print(f"{len(arrays['images'])} images of {len(faces)} faces, "
          f"{np.bincount(arrays['labels']).min()} to {np.bincount(arrays['labels']).max()} a class")
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")
    print("record its SHA-256 in tests/tasks/test_glyphs.py")


if __name__ == "__main__":
    main()
