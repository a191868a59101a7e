"""The levels of difficulty of Glyphs: how the clean drawings are distorted."""

import numpy as np

from l2l_implicit.tasks.glyph_clutter import Background, add_fragments, vary_strokes
from l2l_implicit.tasks.glyph_warp import Images, Warp

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
