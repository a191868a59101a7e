"""What is measured at one K, and by K; without torch, so that the report can read it."""

from __future__ import annotations

from typing import NamedTuple


class Point(NamedTuple):
    """The peak of live tensors in bytes, and seconds (median), of one task's outer step."""

    peak: float
    seconds: float


class Growth(NamedTuple):
    """What was measured by K, and the K that were left out for want of memory."""

    points: dict[int, Point]
    left_out: list[int]
