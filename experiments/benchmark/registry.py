"""The cases by name."""

from __future__ import annotations

from collections.abc import Callable

from experiments.benchmark import cases
from experiments.benchmark.cases import Plan
from experiments.benchmark.comparisons import against_peers, whole_network
from experiments.benchmark.layouts import compiled, layouts
from experiments.benchmark.rows import Row
from experiments.benchmark.together import head_alone, meta_batch
from experiments.tracking import UserError
from l2l_implicit import checks

Case = Callable[[Plan], list[Row]]

CASES: dict[str, Case] = {
    "cnn4-32px": cases.cnn4_32px,
    "two-threads": cases.two_threads,
    "cnn4-84px": cases.cnn4_84px,
    "20-way": cases.twenty_way,
    "20-shot": cases.twenty_shot,
    "wide": cases.wide_head,
    "wide-20-way-1-shot": cases.wide_20_way_1_shot,
    "wide-20-way-5-shot": cases.wide_20_way_5_shot,
    "meta-batch": meta_batch,
    "head": head_alone,
    "chunked": cases.fifty_shot_chunked,
    "k-sweep": cases.steps_sweep,
    "n-sweep": cases.cg_steps_sweep,
    "k-memory": cases.steps_memory,
    "peers": against_peers,
    "imaml": whole_network,
    "layouts": layouts,
    "resnet12": cases.resnet12,
    "resnet12-wide": cases.resnet12_wide,
}
OPTIONAL: dict[str, Case] = {"compile": compiled}


def select(names: str) -> dict[str, Case]:
    """The cases of a list with commas; ``all`` is every one that is not optional.

    Raises:
        UserError: no such case.
    """
    if names == "all":
        return CASES
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    try:
        for name in chosen or [names]:
            checks.choice("cases", name, ["all", *CASES, *OPTIONAL])
    except ValueError as error:
        raise UserError(str(error)) from error
    return {name: {**CASES, **OPTIONAL}[name] for name in chosen}
