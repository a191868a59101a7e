"""What the report shows, in this order. To add a section, write a file and add it here.

A section is a function from a `Request` to what it has to show; one that finds no run of its own
returns an empty list, or says which command is missing.
"""

from __future__ import annotations

from collections.abc import Callable

from experiments.report.content import Section
from experiments.report.sections import listing, papers, sweeps, trainings
from experiments.report.summary import Request

SECTIONS: tuple[Callable[[Request], list[Section]], ...] = (
    listing.overview,
    sweeps.sections,
    papers.memory,
    papers.hypergradient,
    papers.convergence,
    trainings.sections,
    listing.all_runs,
)
