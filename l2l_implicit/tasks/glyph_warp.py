"""Seeded geometric distortion of small grey images, in integer arithmetic.

Parameters are drawn in floating point and rounded once; from there on everything is exact, so
every machine, numpy and instruction set yields the same pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 28
CHUNK = 512  # images warped at a time: keeps the temporaries in cache
UNIT = 2048  # fixed-point units of a pixel
NODES = 4  # the elastic field is given on NODES x NODES points and is bilinear between
NODE_UNIT = 256  # fixed-point units of a pixel in that field

Images = NDArray[np.uint8]  # [n, 28, 28]


@dataclass(frozen=True)
class Warp:
    """Ranges from which each image's own distortion is drawn (uniform, elastic: normal)."""

    rotation: float  # degrees, either way
    scale: tuple[float, float]
    shear: float  # either way
    shift: float  # pixels, either way
    elastic: float  # pixels, standard deviation at a node
    aspect: float = 0.1  # the axes are scaled by 1 + a and 1 - a, |a| up to this

    def __call__(self, images: Images, rng: np.random.RandomState) -> Images:
        """Every image [n, 28, 28] distorted on its own, bilinear, black beyond the border."""
        matrix, offset = self._affine(len(images), rng)
        fields = rng.normal(0, self.elastic * NODE_UNIT, (2, len(images), NODES**2))
        fields = np.rint(fields).astype(np.float32)
        warped = np.empty_like(images)
        for start in range(0, len(images), CHUNK):
            part = slice(start, start + CHUNK)
            columns, rows = _source(matrix[part], offset[part])
            if self.elastic:
                columns += smooth(fields[0, part], NODES) >> 9  # NODE_UNIT * 4096 -> UNIT
                rows += smooth(fields[1, part], NODES) >> 9
            warped[part] = _interpolate(images[part], columns, rows)
        return warped

    def _affine(
        self, n: int, rng: np.random.RandomState
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Inverse maps: matrices [n, 2, 2] in UNIT per two pixels, offsets [n, 2] in UNIT."""
        angle = np.deg2rad(rng.uniform(-self.rotation, self.rotation, n))
        scale = rng.uniform(*self.scale, size=n)
        aspect = rng.uniform(-self.aspect, self.aspect, n)
        shear = rng.uniform(-self.shear, self.shear, n)
        shift = rng.uniform(-self.shift, self.shift, (n, 2))
        along = np.stack([np.cos(angle), np.sin(angle)], 1) / (scale * (1 + aspect))[:, None]
        across = np.stack([-np.sin(angle), np.cos(angle)], 1) / (scale * (1 - aspect))[:, None]
        matrix = np.stack([along + shear[:, None] * across, across], 1)
        centre = (SIDE - 1) / 2
        offset = (centre - np.einsum("nij,nj->ni", matrix, shift)) * UNIT
        return np.rint(matrix * (UNIT // 2)).astype(np.int32), np.rint(offset).astype(np.int32)


def smooth(nodes: NDArray[np.float32], count: int) -> NDArray[np.int32]:
    """Bilinear interpolation of integers [n, count**2] to [n, 28, 28], times 4096.

    Exact in float32 whatever the order of the sum, as long as |nodes| < 4096.
    """
    weights = _hat_functions(count)
    basis = np.einsum("ip,jq->pqij", weights, weights).reshape(count**2, SIDE**2)
    return (nodes @ basis).astype(np.int32).reshape(-1, SIDE, SIDE)


def _hat_functions(count: int) -> NDArray[np.float32]:
    """Weights [28, count] in 64ths of `count` evenly spaced nodes at each pixel."""
    position = np.arange(SIDE) * (count - 1) * 64 // (SIDE - 1)
    first = np.minimum(position // 64, count - 2)
    weights = np.zeros((SIDE, count), np.float32)
    weights[np.arange(SIDE), first] = 64 - (position - 64 * first)
    weights[np.arange(SIDE), first + 1] = position - 64 * first
    return weights


def _source(
    matrix: NDArray[np.int32], offset: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Column and row [n, 28, 28], in UNIT, from which each pixel of the result is taken."""
    twice = 2 * np.arange(SIDE, dtype=np.int32) - (SIDE - 1)  # from the centre, in half pixels
    terms = matrix[..., None] * twice  # [n, 2, 2, 28]
    return tuple(
        terms[:, k, 0, None, :] + (terms[:, k, 1] + offset[:, k, None])[:, :, None] for k in (0, 1)
    )


def _interpolate(images: Images, columns: NDArray, rows: NDArray) -> Images:
    """Bilinear, with one look-up a pixel: its four neighbours are packed into one word."""
    width = SIDE + 4  # two black pixels on each side, so that clipped positions read black
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint32)
    packed = np.zeros_like(padded)
    packed[:, :-1, :-1] = (
        padded[:, :-1, :-1] | padded[:, :-1, 1:] << 8 | padded[:, 1:, :-1] << 16
        | padded[:, 1:, 1:] << 24
    )
    first = np.arange(len(images), dtype=np.int32)[:, None, None] * width**2
    column, row = np.clip(columns >> 11, -2, SIDE), np.clip(rows >> 11, -2, SIDE)
    word = packed.ravel().take(first + (row + 2) * width + column + 2)
    right = ((columns & 2047) >> 3).astype(np.uint32)  # fractions in 256ths
    down = ((rows & 2047) >> 3).astype(np.uint32)
    top = (word & 255) * (256 - right) + (word >> 8 & 255) * right
    bottom = (word >> 16 & 255) * (256 - right) + (word >> 24) * right
    return (top * (256 - down) + bottom * down + 32768 >> 16).astype(np.uint8)
