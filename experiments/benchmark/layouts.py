"""The supervised step in other memory layouts, and compiled: is the floor the lowest there is?"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from experiments.benchmark.cases import Plan
from experiments.benchmark.measure import measure
from experiments.benchmark.ours import supervised
from experiments.benchmark.problem import Shape, build
from experiments.benchmark.rows import Row


def layouts(plan: Plan) -> list[Row]:
    """``channels_last`` against torch's default."""
    return _rows(plan, {"": lambda network: network})


def compiled(plan: Plan) -> list[Row]:
    """The same and ``torch.compile``, which needs a C++ compiler and half a minute."""
    return _rows(plan, {"": lambda network: network, ", compiled": lambda n: torch.compile(n)})


def _rows(plan: Plan, kinds: dict[str, Callable[[nn.Module], nn.Module]]) -> list[Row]:
    shape, steps = Shape(hidden=plan.hidden), {}
    for name, channels_last in (("channels_last", True), ("contiguous", False)):
        problem = build(shape, plan.setting._replace(channels_last=channels_last))
        for suffix, wrap in kinds.items():
            steps[f"supervised, {name}{suffix}"] = supervised(
                problem._replace(backbone=wrap(problem.backbone))
            )
    costs = measure(steps, plan.effort, plan.setting.device)
    return [Row(f"layouts: {shape.title}", name, cost=cost) for name, cost in costs.items()]
