"""Glyphs: real few-shot image tasks that need no download. A class is a character, its images are
that character in 20 to 40 typefaces, distorted with a seed when the data set is made."""

from typing import Any

import numpy as np
import torch

from l2l_implicit.tasks.glyph_levels import LEVELS, distort
from l2l_implicit.tasks.glyphs_file import glyph_arrays
from l2l_implicit.tasks.image_table import ImageTable
from l2l_implicit.tasks.tasksets import (
    MODES,
    Benchmark,
    build_tasksets,
    check_name,
    refuse_unknown,
)

SPLITS = ("random", "script")


class Glyphs(ImageTable):
    """Characters in many typefaces; an item is (float32 [1, 28, 28] in [0, 1], int label).

    The same arguments give the same pixels on every machine. Fragments that clutter an image come
    from the same mode, so no test class is ever seen in training.

    Args:
        mode: "train", "validation" or "test"; their classes are disjoint.
        split: "random" (64 / 16 / 20 % of 536 classes) or "script" (Latin / Greek and Hebrew /
            Cyrillic: test characters of a script never trained on).
        level: "clean", "easy", "medium" or "hard", see `l2l_implicit.tasks.glyph_levels`.
        seed: of the distortions, 0 to 2**32 - 1; it does not change the classes.
        device: where the images live, None for the CPU.

    Attributes:
        classes: the character of each label; `face_families`: the typeface family of each image.

    Raises:
        ValueError: an unknown mode, split or level, a seed out of range, a damaged array file.
        FileNotFoundError: the array file is missing.

    Example:
        >>> image, label = Glyphs("test", level="easy")[0]
        >>> image.shape
        torch.Size([1, 28, 28])
    """

    def __init__(
        self,
        mode: str = "train",
        split: str = "random",
        level: str = "medium",
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        check_name("mode", mode, MODES)
        check_name("split", split, SPLITS)
        check_name("level", level, LEVELS)
        if not 0 <= seed < 2**32:
            raise ValueError(f"expected a seed from 0 to 2**32 - 1, got {seed}: pass one of these")
        arrays = glyph_arrays()
        class_ids = arrays[f"split_{split}_{mode}"]
        members = np.isin(arrays["labels"], class_ids)
        # RandomState, whose streams are frozen, and not Generator, whose streams may change.
        rng = np.random.RandomState([seed, SPLITS.index(split), MODES.index(mode)])
        images = distort(arrays["images"][members], level, rng)
        super().__init__(
            images=torch.tensor(images).unsqueeze(1),
            labels=np.searchsorted(class_ids, arrays["labels"][members]).tolist(),
            classes=[chr(point) for point in arrays["codepoints"][class_ids]],
            device=device,
        )
        self.face_families = arrays["face_families"][arrays["faces"][members]].tolist()


def glyphs_tasksets(
    train_ways: int = 5,
    train_samples: int = 10,
    test_ways: int = 5,
    test_samples: int = 10,
    root: str | None = None,
    device: torch.device | str | None = None,
    split: str = "random",
    level: str = "medium",
    seed: int = 0,
    **kwargs: Any,
) -> Benchmark:
    """(datasets, transforms) of Glyphs, as learn2learn's own benchmarks return them.

    Args:
        train_ways, test_ways: classes of a task (test: also of validation tasks).
        train_samples, test_samples: images of a class in a task, shots plus queries, at most 20.
        root: ignored, the images are in the package.
        device: where the images live, None for the CPU.
        split, level, seed: see `Glyphs`.
        kwargs: nothing else; `data_augmentation=None` is accepted as learn2learn's callers pass it.

    Raises:
        ValueError: more ways or samples than there are, an unknown split or level.
        TypeError: an unknown option.

    Example:
        >>> import learn2learn, l2l_implicit
        >>> tasksets = learn2learn.vision.benchmarks.get_tasksets("glyphs", level="easy")
        >>> tasksets.train.sample()[0].shape
        torch.Size([50, 1, 28, 28])
    """
    refuse_unknown(kwargs, own=("split", "level", "seed"))
    tables = {mode: Glyphs(mode, split, level, seed, device) for mode in MODES}
    return build_tasksets(tables, train_ways, train_samples, test_ways, test_samples)
