"""Progress bars: what is done, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm

from experiments.training.schedule import Schedule


def of_training(schedule: Schedule, silent: bool) -> tqdm:  # type: ignore[type-arg]
    """In outer iterations, or in seconds of training where a budget ends the run."""
    budget = schedule.budget
    if budget is None:
        total = schedule.iterations
        return tqdm(total=total, unit="iteration", desc="meta-training", disable=silent)
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of training [{elapsed}<{remaining}{postfix}]"
    return tqdm(total=budget, desc="meta-training", bar_format=form, disable=silent)


def of_testing(items: Iterable[int]) -> Iterable[int]:
    """Goes away at its end."""
    return tqdm(items, unit="task", desc="meta-testing", leave=False)


def none(items: Iterable[int]) -> Iterable[int]:
    """No bar."""
    return items
