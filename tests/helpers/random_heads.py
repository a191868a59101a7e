"""Random few-shot linear heads: how wrong a learner's hypergradient is, and whether it says so.

An error is the largest of the relative errors in the support features, in the anchor, and in
``l2`` (relative to the size of what it sums). Each problem has its own truth in extended precision
(`head_oracle.py`). Left out are problems on which the two forms of that oracle differ by more than
1e-4, and those whose answer is lost where the right weights and the query loss are rounded to the
learner's precision: there no inner solver can help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from head_problems import (
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
from small_task import adapt
from torch import Tensor, nn
from verdict import Heard

from l2l_implicit import (
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


# Many of them.


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
