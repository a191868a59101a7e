"""Time and memory of several steps, side by side, and the table they make."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from tabulate import tabulate

from experiments.benchmark.steps import Step
from experiments.training.peak_memory import peak_memory


class Cost(NamedTuple):
    """Median seconds, peak bytes, and both over the floor's (time: median of the ratios)."""

    seconds: float
    peak_bytes: float
    time_ratio: float
    memory_ratio: float


def measure(
    steps: Mapping[str, Step], repetitions: int, seconds: float = 20.0, device: str = "cpu"
) -> dict[str, Cost]:
    """The cost of each step by name; the first is the floor.

    Each is repeated as often, in an order drawn anew for each repetition; once one took
    ``seconds`` in all, no further, but 3 times. The floor takes part in all repetitions.
    """
    order, floor, shuffle = list(steps), next(iter(steps)), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.freeze()  # collections are short: they leave out what is there already
    try:
        for step in steps.values():
            step()  # caches, and compilation where there is one
        for repetition in range(repetitions):
            shuffle(order)
            alive = [n for n in order if repetition < 3 or sum(times[n]) < seconds]
            if set(alive) <= {floor}:
                break
            for name in alive if floor in alive else [floor, *alive]:
                gc.collect()
                times[name].append(_seconds_of(steps[name], device))
        # Last: torch.compile gives up on what it has seen under a dispatch mode.
        peaks = {name: peak_memory(step, device) for name, step in steps.items()}
    finally:
        gc.unfreeze()
    return {
        name: Cost(
            statistics.median(taken),
            peaks[name],
            statistics.median(t / f for t, f in zip(taken, times[floor], strict=False)),
            peaks[name] / peaks[floor],
        )
        for name, taken in times.items()
    }


def _seconds_of(step: Step, device: str) -> float:
    """Wall-clock seconds of one call, with nothing pending before or after."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda _: None
    gc.disable()
    try:
        wait(device)
        start = time.perf_counter()
        step()
        wait(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


# The table


class Bar(NamedTuple):
    """What was asked of a figure: at most ``limit``, or at least."""

    quantity: str
    value: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        sign, verdict = ">=" if self.at_least else "<=", "met" if self.met else "MISSED"
        return f"{self.quantity} {self.value:.4f} {sign} {self.limit:g} {verdict}"


class Row(NamedTuple):
    """One line of the table; ``cost`` is None where a bar alone is the result."""

    case: str
    method: str
    steps: int | None = None
    cg_steps: int | None = None
    cost: Cost | None = None
    bars: tuple[Bar, ...] = ()

    @property
    def cells(self) -> list[str]:
        """Without the case: method, K, N, ms, time, MiB, memory, bars."""
        numbers = [""] * 4
        if self.cost is not None:
            seconds, peak, time, memory = self.cost
            numbers = [f"{1000 * seconds:.1f}", f"{time:.3f}", f"{peak / 2**20:.1f}",
                       f"{memory:.3f}"]  # fmt: skip
        counts = ["" if n is None else str(n) for n in (self.steps, self.cg_steps)]
        return [self.method, *counts, *numbers, "; ".join(map(str, self.bars))]

    @property
    def metrics(self) -> dict[str, float]:
        """All figures by name."""
        values = self.cost._asdict() if self.cost else {}
        return values | {f"bar: {bar.quantity}": bar.value for bar in self.bars}


HEADER = ["", "K", "N", "ms", "time", "MiB", "memory", "bars"]


def summary(rows: Iterable[Row]) -> list[str]:
    """How many bars are met, and which are not, a line each."""
    bars = [(row, bar) for row in rows for bar in row.bars]
    missed = [f"{row.case}: {row.method}: {bar}" for row, bar in bars if not bar.met]
    return [f"{len(bars) - len(missed)} of {len(bars)} bars met", *(f"missed: {x}" for x in missed)]


def as_markdown(rows: Sequence[Row]) -> str:
    """One table a case, under a heading."""
    tables = []
    for case in dict.fromkeys(row.case for row in rows):
        cells = [row.cells for row in rows if row.case == case]
        align = ["left", *["right"] * 6, "left"]
        table = tabulate(cells, HEADER, "github", colalign=align, disable_numparse=True)
        tables.append(f"### {case}\n\n{table}")
    return "\n\n".join(tables)
