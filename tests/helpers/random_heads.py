"""Random few-shot linear heads: how wrong a learner's hypergradient is, and whether it says so.

    python tests/helpers/random_heads.py [--number 3000] [--family ordinary|hostile] [--more]

Each problem has its own truth in extended precision (`head_oracle.py`). Left out and counted are
problems on which the two forms of that oracle differ by more than 1e-4, and those whose answer is
lost where the right weights and the query loss are rounded to the learner's precision: there no
inner solver can help.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import count, islice
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2]))  # where it is run as a program

from head_doors import DOORS, DOUBT, LOST, MORE, Outcome, outcomes  # noqa: E402
from head_problems import (  # noqa: E402
    PRECISIONS,
    TASKS,
    Known,
    known,
    problems,
    settings_of,
)


def measure(
    family: str, number: int, doors: Iterable[str], first: int = 0, largest: float = math.inf
) -> Iterator[tuple[list[Known], list[Outcome]]]:
    """``number`` problems from the seed ``first`` on, ``TASKS`` a seed, of so many logits each."""
    doors, seeds = list(doors), count(first)
    sizes = ((s, settings_of(family, s)) for s in seeds)
    fitting = (s for s, size in sizes if size.ways**2 * size.shots <= largest)
    for seed in islice(fitting, math.ceil(number / TASKS)):
        tasks = problems(family, seed)
        truths = [known(task) for task in tasks]
        yield truths, list(outcomes(tasks, truths, doors))


def decade(outcome: Outcome) -> int:
    return math.floor(math.log10(outcome.scale))


def row(found: list[Outcome]) -> list[str]:
    """One line of the table."""
    answered = [o for o in found if not o.refused and not o.broken]
    quiet = [o.error for o in answered if not o.said]
    bounded = [o for o in answered if o.is_bound]
    ratios = [o.bound / max(o.own, 1e-300) for o in bounded]
    beyond = [o.bound / o.own for o in bounded if o.own > o.slack]
    return [
        str(len(found)),
        f"{max((o.error for o in answered), default=math.nan):.1e}",
        f"{max(quiet, default=math.nan):.1e}",
        share(o.wrong for o in found),
        share(o.counted or o.refused for o in found),
        str(sum(o.silent for o in found)),
        str(sum(o.bound_is_low for o in found)),
        f"{statistics.median(ratios):.2g}" if ratios else "-",
        f"{statistics.median(beyond):.2g} ({len(beyond)})" if beyond else "-",
    ]


def share(flags: Iterable[bool]) -> str:
    kept = list(flags)
    return f"{100 * sum(kept) / max(len(kept), 1):.1f} %"


HEADER = [
    "door", "precision", "scale", "number", "worst error", "worst without a word", "above 1 %",
    "warned or refused", "silent and wrong", "bound too low", "bound / error",
    "the same, beyond rounding",
]  # fmt: skip


def table(found: list[Outcome]) -> str:
    rows = [HEADER]
    by_door: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in found:
        by_door[outcome.door, outcome.precision].append(outcome)
    for (door, precision), group in by_door.items():
        for power in sorted({decade(o) for o in group}):
            part = [o for o in group if decade(o) == power]
            scale = f"{10.0**power:g} to {10.0 ** (power + 1):g}"
            rows.append([door, precision, scale, *row(part)])
        rows.append([door, precision, "all", *row(group)])
    widths = [max(len(line[i]) for line in rows) for i in range(len(HEADER))]
    lines = [" | ".join(map(str.ljust, line, widths)) for line in rows]
    rule = "-|-".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


def report(family: str, number: int, doors: list[str], first: int, worst: int) -> int:
    """Print a family's table; how many were wrong without a word."""
    found: list[Outcome] = []
    left_out: Counter[str] = Counter()
    begin = time.perf_counter()
    for done, (truths, new) in enumerate(measure(family, number, doors, first), 1):
        found += new
        left_out["the oracle's two forms differ"] += sum(t.truth.doubt > DOUBT for t in truths)
        for precision in PRECISIONS:
            left_out[f"lost by rounding in {precision}"] += sum(
                t.truth.doubt <= DOUBT and t.floor[precision] > LOST for t in truths
            )
        if sys.stderr.isatty() or done % 100 == 0:
            print(f"{done * TASKS} problems, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    print(f"\n{family}: {number} problems; left out: {dict(left_out)}\n\n{table(found)}\n")
    silent, low = [o for o in found if o.silent], [o for o in found if o.bound_is_low]
    for title, bad in (("silent and wrong", silent), ("bound below the error", low)):
        for o in sorted(bad, key=lambda o: -o.error)[:worst]:
            print(f"{title}: {o.door}, {o.precision}: error {o.error:.2g} ({o.own:.2g} its own), "
                  f"bound {o.bound:.2g}: {o.name} {o.broken[:150]}")  # fmt: skip
    return len(silent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--number", type=int, default=3000, help="problems of each family")
    parser.add_argument("--family", choices=["ordinary", "hostile"], help="default: both")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--more", action="store_true", help="other inner and linear solvers too")
    parser.add_argument("--worst", type=int, default=10, help="how many bad ones to name")
    given = parser.parse_args()
    torch.set_num_threads(1)
    doors = [*DOORS, *(MORE if given.more else [])]
    families = [given.family] if given.family else ["ordinary", "hostile"]
    silent = [report(f, given.number, doors, given.first, given.worst) for f in families]
    return int(any(silent))


if __name__ == "__main__":
    sys.exit(main())
