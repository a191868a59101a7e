"""A Sacred ingredient whose creation neither asks git nor searches for sources."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sacred import Ingredient

from experiments.tracking.config import ModelConfig, Settings

REPOSITORY = Path(__file__).parents[2]


class TrackedIngredient(Ingredient):
    """`sacred.Ingredient` for `TrackedExperiment`, which records sources and commit itself.

    Args:
        name: the group of configuration entries.
        settings: their model.
        ingredients: as in Sacred.
        options: further arguments of `sacred.Ingredient`.
    """

    def __init__(
        self,
        name: str,
        ingredients: Sequence[Ingredient] = (),
        settings: type[Settings] = Settings,
        **options: Any,
    ) -> None:
        options = {"save_git_info": False, "base_dir": str(REPOSITORY), **options}
        caller = sys._getframe(1).f_globals
        super().__init__(name, ingredients=ingredients, _caller_globals=caller, **options)
        self.settings = settings
        self.configurations.append(ModelConfig(settings))
