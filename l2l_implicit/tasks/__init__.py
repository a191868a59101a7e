"""Few-shot tasks: glyphs (embedded), Caltech 101 (a folder of images), and learn2learn's own."""

from l2l_implicit.tasks.caltech101 import Caltech101, caltech101_tasksets
from l2l_implicit.tasks.episode import split_support_query
from l2l_implicit.tasks.glyphs import Glyphs, glyphs_tasksets
from l2l_implicit.tasks.nearest_centroid import nearest_centroid_accuracy
from l2l_implicit.tasks.registry import TASKSETS, get_tasksets, register

__all__ = [
    "TASKSETS",
    "Caltech101",
    "Glyphs",
    "caltech101_tasksets",
    "get_tasksets",
    "glyphs_tasksets",
    "nearest_centroid_accuracy",
    "register",
    "split_support_query",
]

register()
