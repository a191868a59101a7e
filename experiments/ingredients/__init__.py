"""From configuration to objects: tasks, model, algorithm."""

import l2l_implicit  # noqa: F401, I001  (first: it makes learn2learn importable)

from experiments.ingredients.algorithm import algorithm, make_algorithm
from experiments.ingredients.model import build_backbone, make_backbone, model
from experiments.ingredients.tasks import make_tasks, tasks

__all__ = [
    "algorithm",
    "build_backbone",
    "make_algorithm",
    "make_backbone",
    "make_tasks",
    "model",
    "tasks",
]
