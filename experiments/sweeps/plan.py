"""From a sweep's definition and the command line to its cells."""

from __future__ import annotations

import runpy
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.sweeps.definition import Cell, Grid, Settings, Sweep, describe
from experiments.sweeps.definitions import SWEEPS
from experiments.tracking import UserError, wrong
from experiments.tracking.errors import nearest, reason

OPTIONS = ("benchmark", "seeds", "grid", "methods")
MOST_SEEDS = 1000


def find_sweep(name: str) -> Sweep:
    """The sweep of this name, or the `SWEEP` of a Python file; UserError if there is none."""
    if not name.endswith(".py"):
        _known("sweep", name, SWEEPS)
        return SWEEPS[name]
    if not Path(name).is_file():
        raise UserError(f"no file {name} that defines a SWEEP")
    try:
        found = runpy.run_path(name).get("SWEEP")
    except (Exception, SystemExit) as error:  # whatever stands in it
        *_, last = lines = traceback.extract_tb(error.__traceback__)
        line = next((line for line in reversed(lines) if line.filename == name), last)
        got = f"{type(error).__name__}: {reason(error)} ({line.filename}, line {line.lineno})"
        raise wrong(name, "Python that defines SWEEP", got, "mend it") from error
    if not isinstance(found, Sweep):
        raise UserError(f"{name} must define SWEEP, an experiments.sweeps.definition.Sweep")
    return found


class Group(NamedTuple):
    """One method: the cells of its grid, and those of the final runs of each candidate."""

    name: str
    candidates: Grid
    grid: Mapping[str, Cell]  # empty with one candidate only
    finals: tuple[Mapping[str, Cell], ...]

    def final_names(self) -> list[str]:
        """The names of the final cells, which do not depend on the candidate."""
        return list(self.finals[0])


class Plan(NamedTuple):
    """All groups of a sweep; the names of cells are METHOD/grid/N and METHOD/final/SEED."""

    groups: tuple[Group, ...]

    def names(self) -> list[str]:
        """Every cell's name: grids first, since the final runs need them."""
        grids = [name for group in self.groups for name in group.grid]
        return grids + [name for group in self.groups for name in group.final_names()]

    def only(self, name: str) -> Plan:
        """What the cell of this name needs: itself, and the grid of a final run; or UserError."""
        _known("cell", name, self.names())
        group = next(g for g in self.groups if name in (*g.grid, *g.final_names()))
        if name in group.grid:
            return Plan((group._replace(grid={name: group.grid[name]}, finals=({},)),))
        return Plan((group._replace(finals=tuple({name: f[name]} for f in group.finals)),))


def best(accuracies: Sequence[float]) -> int:
    """The index of the candidate that is chosen: the highest accuracy, the first of equals."""
    return list(accuracies).index(max(accuracies))


def make_plan(sweep: Sweep, given: Settings) -> Plan:
    """The cells of a sweep.

    Of ``given``, the command line's KEY=VALUE, `OPTIONS` choose and others are set in every run.
    UserError: an unknown name, or a setting that a grid searches.
    """
    overrides = {key: value for key, value in given.items() if key not in OPTIONS}
    _leaves_ours(overrides)
    for key in overrides:
        if "." not in key and (near := nearest(key, OPTIONS)):
            raise UserError(f"no option {key!r} of a sweep{near}")
    grids = [grid for m in sweep.methods.values() for grid in (m.grid, *m.grids.values())]
    if not (sweep.benchmarks and grids and all(grids)):
        raise UserError("a sweep has a method and a benchmark, and each grid has a candidate")
    benchmark = str(given.get("benchmark", next(iter(sweep.benchmarks))))
    _known("benchmark", benchmark, sweep.benchmarks)
    here = sweep.benchmarks[benchmark]
    seeds = given.get("seeds", sweep.seeds)
    if type(seeds) is not int or not 1 <= seeds <= MOST_SEEDS:
        raise wrong("seeds", f"a number of seeds from 1 to {MOST_SEEDS}", repr(seeds))
    chosen = list(sweep.methods)
    if "methods" in given:
        chosen = [name.strip() for name in str(given["methods"]).split(",")]
    for name in (*chosen, *here.methods):
        _known("method", name, sweep.methods)
    grid_name = str(given.get("grid", ""))
    if "grid" in given:
        _known("grid", grid_name, {name for m in sweep.methods.values() for name in m.grids})

    def cell(name: str, stage: Settings, candidate: Settings, seed: int = 0) -> Cell:
        method = sweep.methods[name]
        layers = [sweep.settings, here.settings, method.settings, stage]
        layers += [here.methods.get(name, {}), candidate, overrides]
        settings = {key: value for layer in layers for key, value in layer.items()}
        _leaves_ours(settings)
        own = [config.replace("{benchmark}", here.like) for config in method.configs]
        return Cell(sweep.module, (*here.configs, *own), {**settings, "seed": seed})

    def group(name: str) -> Group:
        method = sweep.methods[name]
        candidates = method.grids.get(grid_name, method.grid)
        for key in {key for candidate in candidates for key in candidate} & overrides.keys():
            raise UserError(
                f"{key} is what the grid of {name} searches ({describe(candidates[0])}, ...);"
                " leave it out, or choose other methods with methods=A,B"
            )
        final = {**sweep.stage2, **method.final}
        grid = {f"{name}/grid/{n}": cell(name, sweep.stage1, c) for n, c in enumerate(candidates)}
        finals = tuple(
            {f"{name}/final/{seed}": cell(name, final, c, seed) for seed in range(seeds)}
            for c in candidates
        )
        return Group(name, candidates, grid if len(candidates) > 1 else {}, finals)

    return Plan(tuple(group(name) for name in sweep.methods if name in chosen))


def _leaves_ours(settings: Settings) -> None:
    if ours := {"seed", "cell"} & settings.keys():
        raise UserError(f"{min(ours)} is set by the sweep; the number of seeds is seeds=N")


def _known(kind: str, name: str, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        shown = f"expected one of {', '.join(known)}" if len(known) <= 12 else "--list shows all"
        raise UserError(f"no {kind} {name!r}{nearest(name, known)} ({shown})")
