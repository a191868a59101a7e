"""Settings by name, one for each thing people want to run: ``with NAME``.

A key given on the command line beats a named config, in either order.
"""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

from sacred import Experiment


def register(experiment: Experiment) -> None:
    """Offer every named config of this file to ``experiment``."""
    for config in (glyphs, caltech101, paper, anil, smoke):
        experiment.named_config(config)


def glyphs() -> None:
    """The embedded characters, level medium (the default benchmark)."""
    tasks = {"name": "glyphs"}


def caltech101() -> None:
    """Caltech-101 at 32 pixels, CNN4-32, 5-way 5-shot, 3,000 outer iterations."""
    tasks = {"name": "caltech101"}
    iterations = 3000
    validation_tasks = 600


def paper() -> None:
    """Algorithm 1 as printed: 20 gradient steps of 0.1 and 20 CG steps (Yang et al., C.2)."""
    algorithm = {"name": "rm_metal", "step": "gradient", "steps": 20, "cg_steps": 20, "lr": 0.1}


def anil() -> None:
    """ANIL: learn2learn's MAML on the head, features computed once, K = 5."""
    algorithm = {"name": "anil", "steps": 5, "lr": 0.1}


def smoke() -> None:
    """A run of seconds, to see that everything works: easy glyphs, four outer iterations."""
    tasks = {"name": "glyphs", "level": "easy"}
    model = {"hidden": 8}
    iterations = 4
    validate_every = 2
    validation_tasks = 4
    test_tasks = 8
