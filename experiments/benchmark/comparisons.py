"""Against the peers, and iMAML on a whole network: what is measured, and the bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmark import peers
from experiments.benchmark.cases import FLAT, Plan
from experiments.benchmark.measure import Cost, measure, seconds_of
from experiments.benchmark.ours import Step, apart, closure, head_of, implicit, supervised
from experiments.benchmark.problem import Problem, Shape, build
from experiments.benchmark.rows import Bar, Row
from experiments.ingredients.algorithm import solvers
from l2l_implicit import ImplicitMAML, LinearSolution

RELEASED, GRADIENTS, HVP = 5.0, 2.5, 2.2
NEVER_SLOWER, NEVER_LARGER = 1.01, 1.01
TOGETHER, APART = "implicit, newton", "implicit, newton, support and query apart"
OURS = (TOGETHER, "implicit, gradient", APART)

PEERS: dict[str, Callable[[Problem, int], Step]] = {
    "ANIL (learn2learn), features cached": peers.anil,
    "ITD-BiO, features cached": peers.itd_bio,
    "higher, head, features cached": peers.higher_head,
    "ANIL (learn2learn), as published": peers.anil_as_published,
    "ITD-BiO, as published": peers.itd_bio_as_published,
    "MAML (learn2learn), whole network": peers.maml,
}
RELEASED_STEPS = {"released step": False, "released step, CG through the backbone": True}


def against_peers(plan: Plan) -> list[Row]:
    """Ours and every peer, at each K with N = K.

    A peer that runs support and query apart is held against our step that does so too.
    """
    shape = Shape(hidden=plan.hidden)
    problem = build(shape, plan.setting)
    rows = []
    for k in plan.peer_steps:
        costs = measure(_contenders(problem, k), plan.effort, plan.setting.device)
        case = f"peers at K = {k}: {shape.title}"
        rows += [_row(case, k, name, costs) for name in costs]
    return rows


def _contenders(problem: Problem, k: int) -> dict[str, Step]:
    steps = {"supervised": supervised(problem)}
    for step in ("newton", "gradient"):
        steps[f"implicit, {step}"] = implicit(problem, step, closure(k), k)
    steps[APART] = apart(problem, head_of(problem, "newton", k), closure(k))
    for name, peer in PEERS.items():
        steps[name] = peer(problem, k)
    for name, everything in RELEASED_STEPS.items():
        steps[name] = peers.released(problem, k, k, everything)
    return steps


def _row(case: str, k: int, name: str, costs: dict[str, Cost]) -> Row:
    if name == "supervised":
        return Row(case, name, cost=costs[name])
    cg_steps = k if name in OURS or name in RELEASED_STEPS else None
    ours = costs[TOGETHER if "cached" in name else APART]
    bars = () if name in OURS else _duel(ours, costs[name])
    if name in RELEASED_STEPS and k == 20:
        slower = costs[name].time_ratio / ours.time_ratio
        bars = (*bars, Bar("times slower than newton", slower, RELEASED, at_least=True))
    return Row(case, name, k, cg_steps, costs[name], bars)


def _duel(ours: Cost, theirs: Cost) -> tuple[Bar, ...]:
    """Ours over theirs: never slower, never larger, beyond what a median can tell."""
    return (
        Bar("newton's time", ours.time_ratio / theirs.time_ratio, NEVER_SLOWER),
        Bar("newton's memory", ours.peak_bytes / theirs.peak_bytes, NEVER_LARGER),
    )


class TimedSolve(ImplicitMAML):
    """`ImplicitMAML` that takes the time of its Hessian-vector products."""

    seconds: list[float]

    def linear_solve(self, hvp: Any, b: Tensor, start: Tensor | None) -> LinearSolution:
        def timed(vector: Tensor) -> Tensor:
            products: list[Tensor] = []
            self.seconds.append(
                seconds_of(lambda: products.append(hvp(vector)), str(vector.device))
            )
            return products[0]

        return super().linear_solve(timed, b, start)


def whole_network(plan: Plan) -> list[Row]:
    """iMAML in units of one gradient of the support loss.

    In torch's default layout: the second derivatives of batch norm are slow in ``channels_last``,
    a Hessian-vector product in all.
    """
    shape = Shape(hidden=plan.hidden)
    problem = build(shape, plan.setting._replace(channels_last=False))
    network = nn.Sequential(problem.backbone, problem.new_head())
    least, most = min(plan.network_steps), max(plan.network_steps)
    counts = [(k, least) for k in plan.network_steps] + [(least, most)]
    steps: dict[str, Step] = {"one gradient, support set": _gradient(problem, network)}
    for k, n in counts:
        learner = ImplicitMAML(network, 0.01, **_all_products(n))
        steps[f"iMAML, K = {k}, N = {n}"] = _outer_step(problem, learner, k)
    costs = measure(steps, plan.effort, plan.setting.device)
    case = f"iMAML, whole network, in gradients: {shape.title}"
    rows = [Row(case, name, cost=cost, bars=_units(name, cost)) for name, cost in costs.items()]
    peaks = [cost.peak_bytes for name, cost in costs.items() if name.startswith("iMAML")]
    flat = Bar("memory, largest over smallest", max(peaks) / min(peaks), FLAT)
    return [*rows, Row(case, "all K and N", bars=(flat,)), _products(case, problem, network)]


def _all_products(cg_steps: int) -> dict[str, Any]:
    """Gradient steps inside, and a tolerance that conjugate gradient never reaches."""
    return solvers(step="gradient", cg_steps=cg_steps, cg_tol=1e-12)


def _units(name: str, cost: Cost) -> tuple[Bar, ...]:
    is_ours = name.startswith("iMAML")
    return (Bar("gradients' memory", cost.memory_ratio, GRADIENTS),) if is_ours else ()


def _gradient(problem: Problem, network: nn.Module) -> Step:
    images, labels = problem.support
    return lambda: cross_entropy(network(images), labels).backward()


def _outer_step(problem: Problem, parent: Any, steps: int) -> Step:
    images, labels = problem.support
    query, query_labels = problem.query

    def step() -> None:
        learner = parent.clone()
        learner.adapt(lambda: cross_entropy(learner(images), labels), steps=steps)
        cross_entropy(learner(query), query_labels).backward()

    return step


def _products(case: str, problem: Problem, network: nn.Module) -> Row:
    """A Hessian-vector product's time, each next to a gradient's."""
    parent = TimedSolve(network, 0.01, **_all_products(5))
    parent.seconds = []  # clones share it
    _outer_step(problem, parent, 1)()
    parent.seconds.clear()
    gradient = _gradient(problem, network)
    ratios, products = [], []
    for _ in range(3):
        alone = min(seconds_of(gradient, problem.device) for _ in range(5))
        _outer_step(problem, parent, 1)()
        products.append(min(parent.seconds))
        ratios.append(min(parent.seconds) / alone)
        parent.seconds.clear()
    best = sorted(ratios)[1]
    cost = Cost(sorted(products)[1], math.nan, best, math.nan)
    bars = (Bar("gradients' time", best, HVP),)
    return Row(case, "one Hessian-vector product", cost=cost, bars=bars)
