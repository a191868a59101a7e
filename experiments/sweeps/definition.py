"""What a sweep is made of: methods, each with its grid, on benchmarks, for seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments.sweeps.cells import Settings

Grid = tuple[Settings, ...]
NO_GRID: Grid = ({},)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        configs: named configs of the experiment; ``{benchmark}`` stands for the benchmark's `like`.
        grid: the candidates of stage 1; with a single one there is no stage 1.
        grids: other grids by name, asked for with ``grid=NAME``.
        settings: for all of its runs.
        final: for its runs of stage 2.
    """

    configs: tuple[str, ...]
    grid: Grid = NO_GRID
    grids: Mapping[str, Grid] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    final: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Where the methods are compared.

    Args:
        configs: named configs of the experiment, before the method's.
        settings: for all runs.
        like: the benchmark in whose named configs the methods' settings are.
        stage1: for the grid's runs, where this benchmark needs another budget.
        stage2: for the final runs, likewise.
        methods: for the runs of some methods, by their names.
    """

    configs: tuple[str, ...] = ()
    settings: Settings = field(default_factory=dict)
    like: str = ""
    stage1: Settings = field(default_factory=dict)
    stage2: Settings = field(default_factory=dict)
    methods: Mapping[str, Settings] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """Stage 1: each method's grid with seed 0. Stage 2: its best candidate, several seeds.

    The best candidate is the one with the highest final ``validation/accuracy``, the first of
    equals. What is set later in this list wins: `settings`, the benchmark's, the method's, the
    stage's, the method's `final`, the benchmark's for the stage, its for the method, the candidate,
    the command line.

    Args:
        methods: by the name that the listing shows.
        benchmarks: by the name that ``benchmark=NAME`` takes; the first is the default.
        settings: for all runs.
        stage1: settings of the grid's runs.
        stage2: settings of the final runs.
        seeds: of the final runs, 0, 1, ...
        module: the experiment.
    """

    methods: Mapping[str, Method]
    benchmarks: Mapping[str, Benchmark]
    settings: Settings = field(default_factory=dict)
    stage1: Settings = field(default_factory=dict)
    stage2: Settings = field(default_factory=dict)
    seeds: int = 3
    module: str = "experiments.train"
