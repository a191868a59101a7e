"""Stroke width, fragments of other glyphs, and background: what hides a glyph (integers only)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l2l_implicit.tasks.glyph_warp import SIDE, Images, smooth

CHUNK = 1024
NODES = 5  # the background's texture is given on 5 x 5 points
BYTES_DEVIATION = 147.8  # standard deviation of a sum of four random bytes
NEAREST, FARTHEST = 16, 20  # pixels by which a fragment's glyph is pushed out of the image


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
        nodes = rng.uniform(0, self.texture * 255 * 16, (n, NODES**2))
        nodes = np.rint(nodes).astype(np.float32)
        inverted = rng.random_sample(n) < self.inverted
        result = np.empty_like(images)
        for start in range(0, n, CHUNK):
            part = slice(start, start + CHUNK)
            ink = images[part].astype(np.int16)
            texture = (smooth(nodes[part], NODES) >> 16).astype(np.int16)
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
