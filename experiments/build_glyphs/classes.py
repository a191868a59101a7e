"""Which characters become classes: which faces draw each, which look alike and are merged, and the
two fixed splits into train, validation and test."""

import unicodedata
from collections import defaultdict
from itertools import zip_longest

import numpy as np
from scipy.sparse.csgraph import connected_components

from experiments.build_glyphs.drawings import SIDE, Face, Renderings

MIN_IMAGES = 20  # distinct bitmaps a class needs: 5 shots and 15 queries
MAX_IMAGES = 40
MIN_FAMILIES = 8
MAX_PER_FAMILY = 4
IDENTICAL = 0.999  # cosine of two bitmaps from which they count as the same drawing
ALIKE = 0.92  # mean cosine over the faces
ALIKE_IN_CASE = 0.80  # the same for the two cases of one letter
MIN_SHARED_FACES = 3  # fewer faces make no mean
SCRIPTS = ("LATIN", "GREEK", "CYRILLIC", "HEBREW", "ARMENIAN", "GEORGIAN", "THAI", "DEVANAGARI")
SCRIPT_MODES = {"train": ("LATIN",), "validation": ("GREEK", "HEBREW"), "test": ("CYRILLIC",)}
SEED = 0  # of the random split


def eligible_classes(drawn: Renderings, faces: list[Face]) -> dict[int, list[int]]:
    """Code point -> rows of `drawn` that become its images, for characters with enough of them.

    Exact copies of a bitmap count once; families take turns, so that no family dominates.
    """
    rows_of = defaultdict(list)
    for row, point in enumerate(drawn.codepoints.tolist()):
        rows_of[point].append(row)
    chosen = {}
    for point, rows in sorted(rows_of.items()):
        distinct: dict[bytes, int] = {}
        for row in sorted(rows, key=lambda row: (faces[drawn.faces[row]].preference, row)):
            distinct.setdefault(drawn.images[row].tobytes(), row)
        families = defaultdict(list)
        for row in distinct.values():
            families[faces[drawn.faces[row]].family].append(row)
        turns = zip_longest(*(own[:MAX_PER_FAMILY] for _, own in sorted(families.items())))
        picked = [row for turn in turns for row in turn if row is not None]
        if len(families) >= MIN_FAMILIES and len(picked) >= MIN_IMAGES:
            chosen[point] = picked[:MAX_IMAGES]
    return chosen


def merge(chosen: dict[int, list[int]], drawn: Renderings, faces: list[Face]) -> list[int]:
    """Code points that remain once confusable ones are merged, ascending.

    Two are confusable when two families draw them identically, when their mean cosine over the
    faces that draw both exceeds 0.92, or when they are two cases of a letter and it exceeds 0.80.
    Of each connected set the member found in the most families remains (ties: the lowest code
    point).
    """
    points, m = sorted(chosen), len(chosen)
    total, shared, identical = (np.zeros((m, m), t) for t in (np.float32, np.int32, np.int32))
    for family in sorted({face.family for face in faces}):
        in_family = np.zeros((m, m), bool)
        for index in (n for n, face in enumerate(faces) if face.family == family):
            rows = np.flatnonzero((drawn.faces == index) & np.isin(drawn.codepoints, points))
            cells = np.ix_(*2 * (np.searchsorted(points, drawn.codepoints[rows]),))
            vectors = drawn.images[rows].reshape(len(rows), SIDE * SIDE).astype(np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            total[cells] += (cosine := vectors @ vectors.T)
            shared[cells] += 1
            in_family[cells] |= cosine > IDENTICAL
        identical += in_family
    folded = np.array([chr(point).casefold() for point in points])
    limit = np.where(folded[:, None] == folded[None, :], ALIKE_IN_CASE, ALIKE)
    alike = (shared >= MIN_SHARED_FACES) & (total / np.maximum(shared, 1) > limit)
    families = [{faces[index].family for index in drawn.faces[chosen[point]]} for point in points]
    number, group_of = connected_components(alike | (identical >= 2))
    groups = [np.flatnonzero(group_of == group).tolist() for group in range(number)]
    return sorted(points[min(group, key=lambda a: (-len(families[a]), a))] for group in groups)


def script_of(point: int) -> str:
    """The script a character belongs to by its Unicode name; SYMBOL for what is no letter."""
    first = unicodedata.name(chr(point)).split()[0]
    if first in SCRIPTS:
        return first
    if first == "COPTIC":  # the Coptic letters of the Greek block
        return "GREEK"
    if not unicodedata.category(chr(point)).startswith("L"):
        return "SYMBOL"
    return "LATIN" if point < 0x370 else "OTHER"


def random_split(classes: int) -> dict[str, list[int]]:
    """64 / 16 / 20 per cent of the classes, drawn once; sorted class indices by mode."""
    order = np.random.RandomState(SEED).permutation(classes)
    parts = np.split(order, [int(0.64 * classes), int(0.80 * classes)])
    return {mode: sorted(part.tolist()) for mode, part in zip(SCRIPT_MODES, parts, strict=True)}


def script_split(scripts: list[str]) -> dict[str, list[int]]:
    """Train on Latin, validate on Greek and Hebrew, test on Cyrillic (other scripts unused)."""
    return {
        mode: [index for index, script in enumerate(scripts) if script in names]
        for mode, names in SCRIPT_MODES.items()
    }
