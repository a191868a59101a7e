"""What the report shows, in this order. To add a section, write a file and add it here.

A section is a function from a `Request` to what it has to show; one that finds no run of its own
returns an empty list, or says which command is missing.
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.report.content import Section
from experiments.report.request import Request
from experiments.report.sections import (
    convergence,
    hypergradient,
    listing,
    memory,
    other_training,
    overview,
    sweep_results,
)

SECTIONS: tuple[Callable[[Request], list[Section]], ...] = (
    overview.sections,
    sweep_results.sections,
    memory.sections,
    hypergradient.sections,
    convergence.sections,
    other_training.sections,
    listing.sections,
)
