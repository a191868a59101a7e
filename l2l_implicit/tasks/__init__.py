"""Few-shot tasks: embedded, from one's own images, drawn, and those of learn2learn."""

from l2l_implicit.tasks.caltech101 import Caltech101, caltech101_tasksets
from l2l_implicit.tasks.episode import nearest_centroid_accuracy, split_support_query
from l2l_implicit.tasks.folder import FolderImages, folder_tables, folder_tasksets
from l2l_implicit.tasks.glyphs import Glyphs, glyphs_tasksets
from l2l_implicit.tasks.registry import TASKSETS, canonical, get_tasksets, kind_of, register
from l2l_implicit.tasks.sine import sine_tasksets
from l2l_implicit.tasks.tasksets import describe_tasksets

__all__ = [
    "TASKSETS", "Caltech101", "FolderImages", "Glyphs", "caltech101_tasksets", "canonical",
    "describe_tasksets", "folder_tables", "folder_tasksets", "get_tasksets", "glyphs_tasksets",
    "kind_of", "nearest_centroid_accuracy", "register", "sine_tasksets", "split_support_query",
]  # fmt: skip

register()
