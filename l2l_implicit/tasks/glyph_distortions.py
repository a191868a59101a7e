"""The distortions of Glyphs, by level of difficulty: seeded, and in integer arithmetic.

Parameters are drawn in floating point and rounded once; from there on everything is exact, so
every machine, numpy and instruction set yields the same pixels.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE = 28
WARP_CHUNK = 512  # images warped at a time: keeps the temporaries in cache
NOISE_CHUNK = 1024  # images whose noise is drawn at a time: another number, other pixels
UNIT = 2048  # fixed-point units of a pixel
WARP_NODES = 4  # the elastic field is given on 4 x 4 points and is bilinear between
NODE_UNIT = 256  # fixed-point units of a pixel in that field
TEXTURE_NODES = 5  # the background's texture is given on 5 x 5 points
BYTES_DEVIATION = 147.8  # standard deviation of a sum of four random bytes
NEAREST, FARTHEST = 16, 20  # pixels by which a fragment's glyph is pushed out of the image

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
        fields = rng.normal(0, self.elastic * NODE_UNIT, (2, len(images), WARP_NODES**2))
        fields = np.rint(fields).astype(np.float32)
        warped = np.empty_like(images)
        for start in range(0, len(images), WARP_CHUNK):
            part = slice(start, start + WARP_CHUNK)
            columns, rows = _source(matrix[part], offset[part])
            if self.elastic:
                columns += smooth(fields[0, part], WARP_NODES) >> 9  # NODE_UNIT * 4096 -> UNIT
                rows += smooth(fields[1, part], WARP_NODES) >> 9
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


def vary_strokes(images: Images, share: float, rng: np.random.RandomState) -> Images:
    """Thickens this share of the images by one pixel and thins half as many."""
    draw = rng.random_sample(len(images))
    changed = images.copy()
    thick, thin = draw < share, (draw >= share) & (draw < 1.5 * share)
    changed[thick] = _cross(images[thick]).max(0)
    mixed = (_cross(images[thin]).min(0).astype(np.int32) + images[thin]) // 2
    brightest = np.maximum(mixed.max((1, 2), keepdims=True), 1)
    changed[thin] = mixed * 255 // brightest  # thin strokes would otherwise also be dark
    return changed


def add_fragments(
    images: Images, glyphs: Images, share: float, rng: np.random.RandomState
) -> Images:
    """Puts a piece of another glyph at one border of this share of the images."""
    n = len(images)
    other, side = rng.randint(0, len(glyphs), n), rng.randint(0, 4, n)
    push = rng.randint(NEAREST, FARTHEST + 1, n)
    chosen = rng.random_sample(n) < share
    cluttered = images.copy()
    for step in range(NEAREST, FARTHEST + 1):
        far, near = slice(step, SIDE), slice(0, SIDE - step)  # where it lands, where it is from
        for number, (target, source) in enumerate(((far, near), (near, far))):
            for axis in (0, 1):
                rows = np.flatnonzero(chosen & (push == step) & (side == 2 * axis + number))
                view = (rows, slice(None), target) if axis == 0 else (rows, target)
                taken = glyphs[other[rows]]
                piece = taken[:, :, source] if axis == 0 else taken[:, source]
                cluttered[view] = np.maximum(cluttered[view], piece)
    return cluttered


@dataclass(frozen=True)
class Background:
    """Contrast, smooth texture, pixel noise, inversion. Grey values as shares of 255."""

    contrast: tuple[float, float]
    texture: float  # brightest possible texture
    noise: float  # standard deviation
    inverted: float  # share of images turned dark on light

    def __call__(self, images: Images, rng: np.random.RandomState) -> Images:
        """Every image [n, 28, 28] with its own contrast and background."""
        n = len(images)
        contrast = np.rint(rng.uniform(*self.contrast, size=n) * 128).astype(np.int16)
        nodes = rng.uniform(0, self.texture * 255 * 16, (n, TEXTURE_NODES**2))
        nodes = np.rint(nodes).astype(np.float32)
        inverted = rng.random_sample(n) < self.inverted
        result = np.empty_like(images)
        for start in range(0, n, NOISE_CHUNK):
            part = slice(start, start + NOISE_CHUNK)
            ink = images[part].astype(np.int16)
            texture = (smooth(nodes[part], TEXTURE_NODES) >> 16).astype(np.int16)
            mixed = (ink * contrast[part, None, None] >> 7) + ((255 - ink) * texture >> 8)
            mixed += self._noise(ink.shape, rng)
            result[part] = np.clip(mixed, 0, 255)
        result[inverted] = 255 - result[inverted]
        return result

    def _noise(self, shape: tuple[int, ...], rng: np.random.RandomState) -> NDArray[np.int16]:
        """Nearly normal noise: a sum of four random bytes, centred and scaled."""
        parts = np.frombuffer(rng.bytes(4 * int(np.prod(shape))), np.uint8).reshape(4, *shape)
        total = parts.sum(0, dtype=np.int16) - 510
        return total * np.int16(round(self.noise * 255 / BYTES_DEVIATION * 256)) >> 8


def _cross(images: Images) -> Images:
    """Each pixel and its four neighbours, stacked [5, n, 28, 28]."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    return np.stack([
        images, padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2],
        padded[:, 1:-1, 2:],
    ])


def smooth(nodes: NDArray[np.float32], count: int) -> NDArray[np.int32]:
    """Bilinear interpolation of integers [n, count**2] to [n, 28, 28], times 4096.

    Exact in float32 whatever the order of the sum, as long as |nodes| < 4096.
    """
    position = np.arange(SIDE) * (count - 1) * 64 // (SIDE - 1)  # in 64ths of a node's distance
    hats = 64 - np.abs(position[:, None] - 64 * np.arange(count))
    weights = np.maximum(hats, 0).astype(np.float32)
    basis = np.einsum("ip,jq->pqij", weights, weights).reshape(count**2, SIDE**2)
    return (nodes @ basis).astype(np.int32).reshape(-1, SIDE, SIDE)


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


LEVELS = ("clean", "easy", "medium", "hard")
STROKES = 0.2  # share of images with thickened strokes
FRAGMENTS = 0.7  # share of images with a piece of another glyph

WARPS = {
    "easy": Warp(rotation=10, scale=(0.80, 1.10), shear=0.10, shift=1.5, elastic=0.0),
    "medium": Warp(rotation=18, scale=(0.70, 1.10), shear=0.20, shift=2.5, elastic=1.0),
    "hard": Warp(rotation=20, scale=(0.65, 1.10), shear=0.25, shift=3.0, elastic=1.2),
}
BACKGROUNDS = {
    "medium": Background(contrast=(0.4, 1.0), texture=0.35, noise=0.08, inverted=0.0),
    "hard": Background(contrast=(0.4, 1.0), texture=0.35, noise=0.08, inverted=0.5),
}


def distort(images: Images, level: str, rng: np.random.RandomState) -> Images:
    """Clean drawings uint8 [n, 28, 28] -> the same at this level, a function of `rng` alone.

    easy: affine map and stroke width. medium: also an elastic field, pieces of other glyphs at a
    border, contrast, texture and noise. hard: the same, stronger, and half of them inverted.
    """
    if level == "clean":
        return images
    result = vary_strokes(WARPS[level](images, rng), STROKES, rng)
    if level == "easy":
        return result
    return BACKGROUNDS[level](add_fragments(result, images, FRAGMENTS, rng), rng)
