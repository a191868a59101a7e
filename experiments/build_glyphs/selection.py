"""Which characters become classes, and which faces draw each of them."""

from collections import defaultdict

import numpy as np

from experiments.build_glyphs.faces import Face
from experiments.build_glyphs.rendering import Renderings

MIN_IMAGES = 20  # distinct bitmaps a class needs: 5 shots and 15 queries
MAX_IMAGES = 40
MIN_FAMILIES = 8
MAX_PER_FAMILY = 4


def eligible_classes(drawn: Renderings, faces: list[Face]) -> dict[int, list[int]]:
    """Code point -> rows of `drawn` that become its images, for characters with enough of them.

    Exact copies of a bitmap count once; families take turns, so that no family dominates.
    """
    rows_of = defaultdict(list)
    for row, point in enumerate(drawn.codepoints.tolist()):
        rows_of[point].append(row)
    chosen = {}
    for point, rows in sorted(rows_of.items()):
        families = _distinct_by_family(rows, drawn, faces)
        picked = _take_turns(families)
        if len(families) >= MIN_FAMILIES and len(picked) >= MIN_IMAGES:
            chosen[point] = picked[:MAX_IMAGES]
    return chosen


def families_of(rows: list[int], drawn: Renderings, faces: list[Face]) -> set[str]:
    """Names of the families among these rows."""
    return {faces[index].family for index in drawn.faces[np.array(rows)]}


def _distinct_by_family(
    rows: list[int], drawn: Renderings, faces: list[Face]
) -> dict[str, list[int]]:
    """Family -> rows in order of preference, each bitmap kept only where it is met first."""
    seen: set[bytes] = set()
    families = defaultdict(list)
    for row in sorted(rows, key=lambda row: (faces[drawn.faces[row]].preference, row)):
        bitmap = drawn.images[row].tobytes()
        if bitmap not in seen:
            seen.add(bitmap)
            families[faces[drawn.faces[row]].family].append(row)
    return families


def _take_turns(families: dict[str, list[int]]) -> list[int]:
    return [
        families[name][turn]
        for turn in range(MAX_PER_FAMILY)
        for name in sorted(families)
        if turn < len(families[name])
    ]
