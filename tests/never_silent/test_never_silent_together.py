"""Tasks together, one of which is hard: each is right by itself, or the learner says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from head_problems import Problem, Settings, known, query_loss, right_features
from solver_settings import WAYS
from torch import Tensor, nn
from verdict import Heard, off

from l2l_implicit import ImplicitCGHead

D = torch.float64
CLASSES, SHOTS, WIDTH, TASKS, L2 = 3, 3, 12, 4, 0.05
LABELS = torch.arange(CLASSES * SHOTS) % CLASSES


def ordinary(squared: bool = False) -> list[Problem]:
    torch.manual_seed(0)
    l2 = float(torch.tensor(L2))
    settings = Settings("own", 0, CLASSES, SHOTS, WIDTH, l2, squared, "mean", True, "zero")
    head, made = nn.Linear(WIDTH, CLASSES), []
    y = F.one_hot(LABELS, CLASSES).double() if squared else LABELS
    for _ in range(TASKS):
        x, query = torch.randn(9, WIDTH).double(), torch.randn(9, WIDTH).double()
        made.append(Problem(settings, 0, 1.0, (), x, y, query, y.roll(1, 0), head.double()))
    return made


def large(task: Problem) -> Problem:
    return replace(task, x=1000 * task.x, query=1000 * task.query)


def huge_constant(task: Problem) -> Problem:
    x, query = task.x.clone(), task.query.clone()
    x[:, 2] = query[:, 2] = 30000.0
    return replace(task, x=x, query=query)


def empty(task: Problem) -> Problem:
    return replace(task, x=torch.zeros_like(task.x))


def separable(task: Problem) -> Problem:
    far = 300 * F.one_hot(LABELS, WIDTH).double()
    return replace(task, x=task.x + far, query=task.query + far.roll(1, 0))


def one_class(task: Problem) -> Problem:
    if task.settings.squared:
        return replace(task, y=F.one_hot(torch.ones(9).long(), CLASSES).double())
    return replace(task, y=torch.ones(9).long())


def contradictory(task: Problem) -> Problem:
    return replace(task, x=task.x[:1].expand(9, WIDTH).clone())


def solved(task: Problem) -> Problem:
    """The start, which all share, becomes its minimum."""
    solution = torch.from_numpy(known(task).truth.weights.astype("float64"))
    task.head.weight.data, task.head.bias.data = solution[:-1].t().clone(), solution[-1].clone()
    return task


HARD: dict[str, Callable[[Problem], Problem]] = {
    f.__name__: f
    for f in (large, huge_constant, empty, separable, one_class, contradictory, solved)
}


class Together(NamedTuple):
    features: Tensor  # the gradient in them
    counted: list[bool]  # by each task's diagnostics
    warned: bool


def adapt_together(
    tasks: list[Problem], dtype: torch.dtype, steps: int, **settings: Any
) -> Together:
    shared = tasks[0].settings
    x, query = (torch.stack([getattr(t, k) for t in tasks]).to(dtype) for k in ("x", "query"))
    y = torch.stack([t.y for t in tasks])
    head = nn.Linear(WIDTH, CLASSES)
    head.load_state_dict(tasks[0].head.state_dict())
    learner = ImplicitCGHead(head.to(dtype), 0.1, l2=shared.l2, **settings)
    notes: list[Any] = []

    def call() -> Tensor:
        x.requires_grad_()
        adapted = learner.adapt_together(x, y.to(dtype) if shared.squared else y, steps=steps)
        outputs = zip(tasks, adapted(query), strict=True)
        torch.stack([query_loss(task, out) for task, out in outputs]).sum().backward()
        notes.extend(adapted.diagnostics)
        return x.grad

    heard = Heard(call)
    if heard.error is not None:
        raise heard.error
    return Together(heard.value, [note.unsolved > 0 for note in notes], bool(heard.warned))


def or_refused(call: Callable[[], Any]) -> Any:
    """None where one line says why there is nothing."""
    heard = Heard(call)
    if heard.error is not None and not heard.refused:
        raise heard.error
    return heard.value


def check(tasks: list[Problem], got: Together, limit: float = 0.02) -> None:
    for i, task in enumerate(tasks):
        error = off(got.features[i], right_features(task))
        assert error <= limit or (got.counted[i] and got.warned), f"task {i}: {error:.2g} off"


@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("squared", [False, True], ids=["cross-entropy", "squared error"])
@pytest.mark.parametrize("solver", WAYS)
def test_one_hard_task(hard: str, squared: bool, solver: str) -> None:
    """Solved or said for each; and the easy ones are what they are among themselves."""
    easy = ordinary(squared)
    tasks = [HARD[hard](task) if i == 1 else task for i, task in enumerate(easy)]
    for dtype in (torch.float32, D):
        got = or_refused(partial(adapt_together, tasks, dtype, 60, **WAYS[solver]))
        if got is None:  # gradient descent that diverges names the task
            assert solver == "gradient descent"
            continue
        check(tasks, got)
        assert hard != "solved" or solver != "default" or not any(got.counted) and not got.warned
        among = adapt_together(easy, dtype, 60, **WAYS[solver])
        for i in (0, 2, 3):
            assert off(got.features[i], among.features[i].double()) < 1e-4
            assert got.counted[i] == among.counted[i]


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("where", ["x", "y", "query"])
@pytest.mark.parametrize("solver", WAYS)
def test_a_task_with_a_number_that_is_none(value: float, where: str, solver: str) -> None:
    """One line, or the other tasks are right and all is finite, or something is said."""
    tasks = ordinary(squared=True)
    spoilt = getattr(tasks[2], where).clone()
    spoilt[4, 1] = value
    tasks[2] = replace(tasks[2], **{where: spoilt})
    got = or_refused(lambda: adapt_together(tasks, torch.float32, 30, **WAYS[solver]))
    if got is None:
        return
    for i in (0, 1, 3):
        error = off(got.features[i], right_features(tasks[i]))
        assert error <= 0.02 or got.warned, f"task {i}: {error:.2g} off"
    assert bool(torch.isfinite(got.features[2]).all()) or got.warned


@pytest.mark.parametrize("solver", WAYS)
def test_padded_tasks(solver: str) -> None:
    """Fewer samples in some tasks, the rest with the label that torch leaves out, or refused."""
    tasks = ordinary()
    x, y = torch.stack([task.x for task in tasks]), torch.stack([task.y for task in tasks])
    padded = y.clone()
    padded[1, 6:] = padded[3, 3:] = -100
    query = torch.stack([task.query for task in tasks])

    def gradient() -> Tensor:
        features = x.clone().requires_grad_()
        learner = ImplicitCGHead(tasks[0].head, 0.1, l2=L2, **WAYS[solver])
        heads = learner.adapt_together(features, padded, steps=40)
        F.cross_entropy(heads(query).flatten(0, 1), y.flatten()).backward()
        return features.grad

    heard = Heard(gradient)
    if heard.error is not None:
        assert heard.refused, repr(heard.error)
        return
    for i, shots in ((1, 6), (3, 3)):
        task = replace(tasks[i], x=x[i, :shots], y=y[i, :shots], query_y=y[i])
        right = F.pad(known(task).truth.features, (0, 0, 0, 9 - shots)) / TASKS
        assert off(heard.value[i], right) < 0.02 or heard.warned
