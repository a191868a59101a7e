"""The floor, tasks of other sizes, chunks, and growth with K and N: what is measured, and the bars.

A case is a function of the `Plan`, which returns rows; `CASES` in ``registry.py`` names them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from experiments.benchmark.measure import Cost, Effort, growth, measure, warm_peak
from experiments.benchmark.ours import (
    Step,
    chunked,
    closure,
    head_of,
    implicit,
    loss_tensors,
    supervised,
)
from experiments.benchmark.problem import Problem, Setting, Shape, build
from experiments.benchmark.rows import Bar, Row

CLOSURE_TIME, TENSORS_TIME, OTHER_TIME = 1.05, 1.08, 1.10
FLOOR_MEMORY = 1.01
CHUNKED_TIME, CHUNKED_MEMORY = 1.4, 0.25
GROWTH, FLAT = 1.10, 1.01


class Limits(NamedTuple):
    """Of time by ``adapt(closure)`` and by ``adapt(loss)``, and of memory, over the floor's."""

    closure: float
    tensors: float
    memory: float | None = None


FLOOR = Limits(CLOSURE_TIME, TENSORS_TIME, FLOOR_MEMORY)
OTHER = Limits(OTHER_TIME, OTHER_TIME)
WIDE = Limits(CLOSURE_TIME, OTHER_TIME)


class Plan(NamedTuple):
    """The configuration, as the cases read it."""

    setting: Setting = Setting()
    effort: Effort = Effort()
    hidden: int = 64
    steps: int = 20
    cg_steps: int = 20
    peer_steps: Sequence[int] = (1, 5, 20, 100)
    sweep_steps: Sequence[int] = (5, 20, 50, 100, 200)
    sweep_cg_steps: Sequence[int] = (5, 10, 20, 50, 100)
    memory_steps: Sequence[int] = (1, 10, 100, 1000, 10000)
    network_steps: Sequence[int] = (1, 5, 20)
    chunk_size: int = 25


def rows_of(
    case: str, plan: Plan, costs: Mapping[str, Cost], bars: Mapping[str, tuple[Bar, ...]]
) -> list[Row]:
    """One row a method; the floor has neither K nor N."""
    floor = next(iter(costs))
    return [
        Row(
            case,
            name,
            None if name == floor else plan.steps,
            None if name == floor else plan.cg_steps,
            cost,
            bars.get(name, ()),
        )
        for name, cost in costs.items()
    ]


def floor_bars(cost: Cost, time: float, memory: float | None = None) -> tuple[Bar, ...]:
    bars = [Bar("time", cost.time_ratio, time)]
    return (*bars, Bar("memory", cost.memory_ratio, memory)) if memory else tuple(bars)


def variants(problem: Problem, plan: Plan, tensors: bool) -> dict[str, Step]:
    """The floor, and the implicit head in its ways to step and to be called."""
    ways = {"adapt(closure)": closure(plan.steps)}
    if tensors:
        ways["adapt(loss)"] = loss_tensors(plan.steps)
    steps = {"supervised": supervised(problem)}
    for step in ("newton", "gradient"):
        for call, adapt in ways.items():
            steps[f"implicit, {step}, {call}"] = implicit(problem, step, adapt, plan.cg_steps)
    return steps


def _against_floor(
    plan: Plan, shape: Shape, limits: Limits, tensors: bool = True, note: str = ""
) -> list[Row]:
    problem = build(shape, plan.setting)
    costs = measure(variants(problem, plan, tensors), plan.effort, plan.setting.device)
    bars = {}
    for name, cost in costs.items():
        if name.startswith("implicit"):
            time = limits.tensors if name.endswith("adapt(loss)") else limits.closure
            bars[name] = floor_bars(cost, time, limits.memory)
    width = problem.head.in_features
    return rows_of(f"{shape.title}, {width} features{note}", plan, costs, bars)


def cnn4_32px(plan: Plan) -> list[Row]:
    return _against_floor(plan, Shape(hidden=plan.hidden), FLOOR)


def two_threads(plan: Plan) -> list[Row]:
    """The same with two threads of torch, the floor too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return _against_floor(plan, Shape(hidden=plan.hidden), FLOOR, note=", two threads")
    finally:
        torch.set_num_threads(before)


def cnn4_84px(plan: Plan) -> list[Row]:
    shape = Shape(hidden=min(32, plan.hidden), pixels=84)
    return _against_floor(plan, shape, FLOOR)


def resnet12(plan: Plan) -> list[Row]:
    shape = Shape("resnet12", pixels=84)
    return _against_floor(plan, shape, FLOOR, tensors=False)


def twenty_way(plan: Plan) -> list[Row]:
    return _against_floor(plan, Shape(hidden=plan.hidden, ways=20), OTHER)


def twenty_shot(plan: Plan) -> list[Row]:
    return _against_floor(plan, Shape(hidden=plan.hidden, shots=20), OTHER)


def wide_head(plan: Plan) -> list[Row]:
    shape = Shape("cnn4, pooled once", hidden=plan.hidden)
    return _against_floor(plan, shape, WIDE)


def wide_20_way_1_shot(plan: Plan) -> list[Row]:
    shape = Shape("cnn4, pooled once", hidden=plan.hidden, ways=20, shots=1)
    return _against_floor(plan, shape, WIDE, tensors=False)


def wide_20_way_5_shot(plan: Plan) -> list[Row]:
    shape = Shape("cnn4, pooled once", hidden=plan.hidden, ways=20)
    return _against_floor(plan, shape, WIDE, tensors=False)


def resnet12_wide(plan: Plan) -> list[Row]:
    shape = Shape("resnet12, 16,000 features", pixels=84)
    return _against_floor(plan, shape, OTHER, tensors=False)


def fifty_shot_chunked(plan: Plan) -> list[Row]:
    """Chunks need a backbone without batch statistics: GroupNorm, for the floor too."""
    shape = Shape("cnn4, GroupNorm", hidden=plan.hidden, shots=50)
    problem, adapt = build(shape, plan.setting), closure(plan.steps)
    name = f"implicit, newton, chunks of {plan.chunk_size} images"
    steps = {
        "supervised": supervised(problem),
        "implicit, newton": implicit(problem, "newton", adapt, plan.cg_steps),
        name: chunked(
            problem, head_of(problem, "newton", plan.cg_steps), adapt, plan.chunk_size
        ),
    }
    costs = measure(steps, plan.effort, plan.setting.device)
    bars = {name: floor_bars(costs[name], CHUNKED_TIME, CHUNKED_MEMORY)}
    return rows_of(shape.title, plan, costs, bars)


def steps_sweep(plan: Plan) -> list[Row]:
    """Time over K at N = 20."""
    plans = [plan._replace(steps=k) for k in plan.sweep_steps]
    return _sweep("K", plan, plans, {})


def cg_steps_sweep(plan: Plan) -> list[Row]:
    """Time over N at K = 20; once as it is used, once with a tolerance that is never reached.

    Newton's backward pass uses the factor of its inner solve: it takes no such step.
    """
    plans = [plan._replace(cg_steps=n) for n in plan.sweep_cg_steps]
    rows = _sweep("N", plan, plans, {})
    return rows + _sweep("N, all of them (cg_tol = 1e-12)", plan, plans, {"cg_tol": 1e-12})


def _sweep(
    what: str, plan: Plan, plans: Sequence[Plan], settings: Mapping[str, float]
) -> list[Row]:
    shape = Shape(hidden=plan.hidden)
    problem = build(shape, plan.setting)
    steps, of = {"supervised": supervised(problem)}, {}
    for step in ("newton", "gradient"):
        for each in plans:
            name = f"implicit, {step}, K = {each.steps}, N = {each.cg_steps}"
            adapt = closure(each.steps)
            steps[name] = implicit(problem, step, adapt, each.cg_steps, **settings)
            of[name] = step, each
    costs = measure(steps, plan.effort, plan.setting.device)
    case = f"growth with {what}: {shape.title}"
    rows = [Row(case, "supervised", cost=costs["supervised"])]
    for step in ("newton", "gradient"):
        group = {name: costs[name] for name, (s, _) in of.items() if s == step}
        for name, cost in group.items():
            each = of[name][1]
            rows.append(Row(case, f"implicit, {step}", each.steps, each.cg_steps, cost))
        bar = Bar("time, largest over smallest", growth(group), GROWTH)
        rows.append(Row(case, f"implicit, {step}, whole range", bars=(bar,)))
    return rows


def steps_memory(plan: Plan) -> list[Row]:
    """Peak memory over K: gradient steps, which are all taken, by closure and by loss tensors."""
    shape = Shape(hidden=plan.hidden)
    problem = build(shape, plan.setting)
    case = f"memory over K: {shape.title}"
    floor = warm_peak(supervised(problem), plan.setting.device)
    rows = [Row(case, "supervised", cost=Cost.of_memory(floor, floor))]
    for call, adapt in (("adapt(closure)", closure), ("adapt(loss)", loss_tensors)):
        name, peaks = f"implicit, gradient, {call}", []
        for k in plan.memory_steps:
            step = implicit(problem, "gradient", adapt(k), plan.cg_steps)
            peaks.append(warm_peak(step, plan.setting.device))
            cost = Cost.of_memory(peaks[-1], floor)
            rows.append(Row(case, name, k, plan.cg_steps, cost))
        bar = Bar("memory, largest over smallest", max(peaks) / min(peaks), FLAT)
        rows.append(Row(case, f"{name}, whole range", bars=(bar,)))
    return rows
