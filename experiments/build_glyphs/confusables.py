"""Classes that look alike are merged: their best-covered member stands for all."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experiments.build_glyphs.faces import Face
from experiments.build_glyphs.rendering import SIDE, Renderings
from experiments.build_glyphs.selection import families_of

IDENTICAL = 0.999  # cosine of two bitmaps from which they count as the same drawing
ALIKE = 0.92  # mean cosine over the faces
ALIKE_IN_CASE = 0.80  # the same for the two cases of one letter
MIN_SHARED_FACES = 3  # fewer faces make no mean


@dataclass(frozen=True)
class Similarity:
    """For every pair of classes [m, m]: mean cosine, faces shared, families that draw both alike.
    """

    mean_cosine: NDArray[np.float32]
    shared_faces: NDArray[np.int32]
    identical_families: NDArray[np.int32]


def merge(chosen: dict[int, list[int]], drawn: Renderings, faces: list[Face]) -> list[int]:
    """Code points that remain once confusable ones are merged, ascending.

    Two are confusable when two families draw them identically, when their mean cosine exceeds
    0.92, or when they are two cases of a letter and it exceeds 0.80. Of each connected set the
    member found in the most families remains (ties: the lowest code point).
    """
    points = sorted(chosen)
    alike = _confusable(similarity(points, drawn, faces), points)
    coverage = [len(families_of(chosen[point], drawn, faces)) for point in points]
    groups = connected(alike)
    return sorted(points[min(group, key=lambda a: (-coverage[a], a))] for group in groups)


def similarity(points: list[int], drawn: Renderings, faces: list[Face]) -> Similarity:
    """Compares the classes within each face: cosine of the bitmaps as vectors of 784 pixels."""
    m = len(points)
    total, shared = np.zeros((m, m), np.float32), np.zeros((m, m), np.int32)
    identical = np.zeros((m, m), np.int32)
    family_identical = np.zeros((m, m), bool)
    by_family = sorted(range(len(faces)), key=lambda index: (faces[index].family, index))
    for position, index in enumerate(by_family):
        rows = np.flatnonzero((drawn.faces == index) & np.isin(drawn.codepoints, points))
        cells = np.ix_(*2 * (np.searchsorted(points, drawn.codepoints[rows]),))
        cosine = _cosines(drawn.images[rows])
        total[cells] += cosine
        shared[cells] += 1
        family_identical[cells] |= cosine > IDENTICAL
        last = position + 1 == len(by_family)
        if last or faces[by_family[position + 1]].family != faces[index].family:
            identical += family_identical
            family_identical[:] = False
    return Similarity(total / np.maximum(shared, 1), shared, identical)


def connected(linked: NDArray[np.bool_]) -> list[list[int]]:
    """Connected sets of a symmetric relation [m, m], by union-find."""
    parent = list(range(len(linked)))

    def root(member: int) -> int:
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for a, b in np.argwhere(np.triu(linked, 1)).tolist():
        parent[max(root(a), root(b))] = min(root(a), root(b))
    groups: dict[int, list[int]] = {}
    for member in range(len(linked)):
        groups.setdefault(root(member), []).append(member)
    return list(groups.values())


def _confusable(found: Similarity, points: list[int]) -> NDArray[np.bool_]:
    folded = np.array([chr(point).casefold() for point in points])
    same_letter = folded[:, None] == folded[None, :]
    enough = found.shared_faces >= MIN_SHARED_FACES
    limit = np.where(same_letter, ALIKE_IN_CASE, ALIKE)
    return (found.identical_families >= 2) | (enough & (found.mean_cosine > limit))


def _cosines(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    vectors = images.reshape(len(images), SIDE * SIDE).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T
