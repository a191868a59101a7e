"""Compares two builds by closeness: FreeType versions move pixels, so no hash can."""

import numpy as np
from numpy.typing import NDArray


def closeness(ours: dict[str, NDArray], theirs: dict[str, NDArray]) -> str:
    """Says how many classes two builds share and how near their images of one class are.

    For each image of ours: the smallest mean absolute difference, in grey values of 255, to an
    image of the same character in the other build.
    """
    mine = {int(point): index for index, point in enumerate(ours["codepoints"])}
    other = {int(point): index for index, point in enumerate(theirs["codepoints"])}
    shared = sorted(mine.keys() & other.keys())
    gaps = np.concatenate([
        _nearest(ours["images"][ours["labels"] == mine[point]],
                 theirs["images"][theirs["labels"] == other[point]])
        for point in shared
    ])
    same, close = (gaps == 0).mean(), (gaps < 3).mean()
    return (
        f"{len(shared)} classes in both, {len(mine) - len(shared)} only here, "
        f"{len(other) - len(shared)} only there; of {len(gaps)} images {same:.1%} identical, "
        f"{close:.1%} within 3 grey values, median {np.median(gaps):.2f}, mean {gaps.mean():.2f}"
    )


def _nearest(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    differences = np.abs(images[:, None].astype(np.int16) - others[None].astype(np.int16))
    return differences.mean((2, 3)).min(1)
