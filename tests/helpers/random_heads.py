"""Random few-shot linear heads: how wrong a learner's hypergradient is, and whether it says so.

    python tests/helpers/random_heads.py [--number 3000] [--family ordinary|hostile] [--more]

An error is the largest of the relative errors in the support features, in the anchor, and in ``l2``
(relative to the size of what it sums). Each problem has its own truth in extended precision
(`head_oracle.py`). Left out and counted are problems on which the two forms of that oracle differ by
more than 1e-4, and those whose answer is lost where the right weights and the query loss are rounded
to the learner's precision: there no inner solver can help.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[2]))  # where it is run as a program

from head_problems import (  # noqa: E402
    PRECISIONS,
    TASKS,
    Known,
    Problem,
    compared,
    known,
    loss_of,
    problems,
    query_loss,
    settings_of,
)
from small_task import adapt  # noqa: E402
from verdict import Heard  # noqa: E402

from l2l_implicit import (  # noqa: E402
    LBFGS,
    Direct,
    GradientDescent,
    ImplicitCGHead,
    ImplicitMAML,
    Newton,
)

DOUBT, LOST, WRONG, STEPS = 1e-4, 1e-3, 0.01, 20
ROUNDING = {"float32": 4e-6, "float64": 1e-10}  # what every processor does in its own way


class Outcome(NamedTuple):
    """One hypergradient of one learner; of T tasks together, one a task."""

    name: str  # of the problem, which itself is not kept
    scale: float
    door: str
    precision: str
    error: float  # nan where it was refused
    own: float  # the same without what a task shares with others
    slack: float  # what rounding may add to the error
    warned: bool  # the learner did, of this task or another one
    refused: bool
    counted: bool  # as unsolved, by the task's diagnostics
    bound: float
    is_bound: bool
    broken: str = ""  # an error that is no refusal

    @property
    def said(self) -> bool:
        return self.warned or self.refused

    @property
    def wrong(self) -> bool:
        return bool(self.broken) or not self.refused and not self.error <= WRONG + self.slack

    @property
    def silent(self) -> bool:
        return self.wrong and not self.said

    @property
    def bound_is_low(self) -> bool:
        return self.is_bound and not self.refused and self.bound + self.slack < self.own


class Gradients(NamedTuple):
    """What a backward pass left, for T tasks."""

    features: list[Tensor]
    l2: float
    start: Tensor | None  # [d, k], of an anchor that is meta-learned
    diagnostics: list[Any]


class Leaves:
    """The problems' tensors in one precision."""

    def __init__(self, tasks: list[Problem], dtype: torch.dtype) -> None:
        self.tasks, self.settings, self.dtype = tasks, tasks[0].settings, dtype
        self.x = torch.stack([p.x for p in tasks]).to(dtype).requires_grad_()
        self.query = torch.stack([p.query for p in tasks]).to(dtype)
        self.y = torch.stack([p.y for p in tasks])
        self.y = self.y.to(dtype) if self.settings.squared else self.y
        self.l2 = torch.tensor(self.settings.l2, dtype=dtype, requires_grad=True)
        self.head = nn.Linear(self.settings.width, self.settings.ways, self.settings.bias)
        self.head.load_state_dict(tasks[0].head.state_dict())
        self.head.to(dtype)

    def learner(self, kind: type[ImplicitCGHead], **settings: Any) -> ImplicitCGHead:
        anchor = self.settings.anchor
        return kind(self.head, 0.1, l2=self.l2, anchor=anchor, **settings)

    def support(self, logits: Tensor, task: int) -> Tensor:
        return loss_of(self.settings, logits, self.y[task], self.settings.reduction)

    def gradients(self, diagnostics: list[Any]) -> Gradients:
        assert self.x.grad is not None and self.l2.grad is not None
        start = None
        if self.settings.anchor == "init":
            start = torch.cat([p.grad.view(len(p), -1) for p in self.head.parameters()], 1).t()
        return Gradients(list(self.x.grad), float(self.l2.grad), start, diagnostics)


Door = Callable[[Leaves], Gradients]


def alone(kind: type[ImplicitCGHead], how: str, **settings: Any) -> Door:
    """One task by its clone: five loss tensors, as learn2learn's scripts have it, or a closure."""

    def run(leaves: Leaves) -> Gradients:
        learner, x = leaves.learner(kind, **settings).clone(), leaves.x[0]
        steps = STEPS if how == "closure" else 5
        adapt(learner, lambda: leaves.support(learner(x), 0), how, steps)
        query_loss(leaves.tasks[0], learner(leaves.query[0])).backward()
        return leaves.gradients([learner.diagnostics])

    return run


def together(leaves: Leaves) -> Gradients:
    settings = leaves.settings
    loss = nn.MSELoss if settings.squared else nn.CrossEntropyLoss
    learner = leaves.learner(ImplicitCGHead, loss=loss(reduction=settings.reduction))
    adapted = learner.adapt_together(leaves.x, leaves.y, steps=STEPS)
    logits = zip(leaves.tasks, adapted(leaves.query), strict=True)
    torch.stack([query_loss(task, outputs) for task, outputs in logits]).sum().backward()
    return leaves.gradients(adapted.diagnostics)


DOORS: dict[str, Door] = {
    "five losses": alone(ImplicitCGHead, "losses"),
    "closure": alone(ImplicitCGHead, "closure"),
    "iMAML": alone(ImplicitMAML, "closure", inner=Newton()),
    "together": together,
}
MORE: dict[str, Door] = {
    "Direct": alone(ImplicitCGHead, "closure", linear=Direct()),
    "LBFGS": alone(ImplicitCGHead, "closure", inner=LBFGS()),
    "GradientDescent": alone(ImplicitCGHead, "closure", inner=GradientDescent()),
    "five steps": alone(ImplicitCGHead, "losses", inner=GradientDescent()),
}


def outcomes(
    tasks: list[Problem], truths: list[Known], doors: Iterable[str]
) -> Iterator[Outcome]:
    """Every door and precision for problems of the same settings."""
    for door in doors:
        if door == "iMAML" and tasks[0].settings.anchor != "init":
            continue
        groups = [range(len(tasks))] if door == "together" else [[i] for i in range(len(tasks))]
        for group in groups:
            for precision in PRECISIONS:
                chosen, their = [tasks[i] for i in group], [truths[i] for i in group]
                if not lost(their, precision):
                    yield from run(chosen, their, door, precision)


def lost(truths: list[Known], precision: str) -> bool:
    return any(known.truth.doubt > DOUBT or known.floor[precision] > LOST for known in truths)


def run(
    tasks: list[Problem], truths: list[Known], door: str, precision: str
) -> Iterator[Outcome]:
    leaves = Leaves(tasks, PRECISIONS[precision])
    heard = Heard(lambda: {**DOORS, **MORE}[door](leaves))
    broken = "" if heard.error is None or heard.refused else repr(heard.error)
    shared = shared_error(truths, heard.value)
    for i, (task, (truth, floor)) in enumerate(zip(tasks, truths, strict=True)):
        slack = 2 * floor[precision] + truth.doubt + ROUNDING[precision]
        if heard.error is not None:
            nan, refused = math.nan, heard.refused
            yield Outcome(
                task.name, task.scale, door, precision, nan, nan, slack,
                False, refused, False, nan, False, broken,
            )  # fmt: skip
            continue
        own = compared(truth, heard.value.features[i], truth.l2, None)[0]
        notes = heard.value.diagnostics[i]
        error = max(own, shared)
        yield Outcome(
            task.name, task.scale, door, precision, error, error if len(tasks) == 1 else own, slack,
            bool(heard.warned), False, notes.unsolved > 0,
            notes.hypergradient_error, notes.is_bound,
        )  # fmt: skip


def shared_error(truths: list[Known], got: Gradients | None) -> float:
    """Of what the tasks share, ``l2`` and the anchor: against the sum of their truths."""
    if got is None:
        return math.nan
    found = [known.truth for known in truths]
    total = found[0]._replace(
        l2=math.fsum(t.l2 for t in found),
        l2_scale=math.fsum(t.l2_scale for t in found),
        start=torch.stack([t.start for t in found]).sum(0),
    )
    return max(compared(total, total.features, got.l2, got.start)[1:])


# Many of them, and the table.


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
