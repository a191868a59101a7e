"""What is measured, case by case, and the bars. A case is a function of the settings -> rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from learn2learn.algorithms import MAML
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.benchmark import steps as outer
from experiments.benchmark.measure import Bar, Cost, Row, measure
from experiments.benchmark.steps import PEERS, Problem, Step, closure, implicit, loss_tensors
from experiments.ingredients.algorithm import make_algorithms
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.tracking import UserError
from experiments.tracking.config import Count, Counts, Positive, RunSettings, Seed, Text, Threads
from experiments.training.episodes import Episode
from experiments.training.meta_learner import MEASURES, MetaLearner
from l2l_implicit import (
    CG,
    GaussNewton,
    GradientDescent,
    Hessian,
    ImplicitCGHead,
    ImplicitMAML,
    LinearSolution,
)
from l2l_implicit.checks import choice
from l2l_implicit.chunked import Chunked

GROWTH, FLAT = 1.10, 1.01  # over all K: of time, of memory
TASKS = 8  # of a meta batch
RELEASED, NEVER_SLOWER, NEVER_LARGER = 5.0, 1.01, 1.01
# Memory of an iMAML step, and time of a Gauss-Newton product and of a Hessian one, in gradients.
GRADIENTS, GNP, HVP = 2.5, 2.8, 2.2


Limits = Mapping[str, tuple[float, ...]]
"""Of time and, where there are two, of memory over the floor's: by method, or by call."""

FLOOR: Limits = {"adapt(closure)": (1.05, 1.01), "adapt(loss)": (1.08, 1.01)}
WIDE: Limits = {"adapt(closure)": (1.05,), "adapt(loss)": (1.10,)}


class BenchmarkSettings(RunSettings):
    """The settings of this experiment."""

    cases: Text = "all"  # names with commas: see experiments/benchmark/cases.py
    repetitions: Count = 30  # of each method
    # a method that took this long in all is repeated no further (but 3 times)
    seconds: Positive = 20.0
    steps: Count = 20  # inner steps K
    cg_steps: Count = 20  # conjugate gradient steps N
    peer_steps: Counts = [1, 5, 20, 100]  # K (and N) of the comparison with other methods
    sweep_steps: Counts = [5, 20, 50, 100, 200]  # K, at N = cg_steps
    network_steps: Counts = [1, 5, 20]  # K (and N) of iMAML on the whole network
    hidden: Count = 64  # filters a layer
    chunk_size: Count = 25  # images
    channels_last: bool = True  # for every method
    compile: bool = False  # in the case layouts, also by torch.compile: half a minute
    device: Text = "cpu"  # cpu, cuda, cuda:1, ...; auto: a GPU if there is one
    threads: Threads = 1  # of torch; 0 leaves torch's own choice
    seed: Seed = 0  # of all random numbers
    output: Text = "runs"  # the folder of the table

    def problem(
        self, network: str = "cnn4", channels_last: bool | None = None, **shape: int
    ) -> Problem:
        last = self.channels_last if channels_last is None else channels_last
        return outer.build(network, self.hidden, device=self.device, channels_last=last,
                           seed=self.seed, **shape)  # fmt: skip

    def costs(self, steps: Mapping[str, Step]) -> dict[str, Cost]:
        """Of each step; the first is the floor."""
        return measure(steps, self.repetitions, self.seconds, self.device)

    def rows(self, case: str, costs: Mapping[str, Cost], limits: Limits | None = None) -> list[Row]:
        """One row a method, the floor first; ours with K and N."""
        rows = []
        for name, cost in costs.items():
            counts = (self.steps, self.cg_steps) if name.startswith("implicit") else (None, None)
            ratios, asked = (cost.time_ratio, cost.memory_ratio), (limits or {}).get(name, ())
            bars = tuple(map(Bar, ("time", "memory"), ratios, asked))
            rows.append(Row(case, name, *counts, cost, bars))
        return rows


Case = Callable[[BenchmarkSettings], list[Row]]
CALLS = {"adapt(closure)": closure, "adapt(loss)": loss_tensors}


# Against the floor, one supervised step


def against_floor(
    c: BenchmarkSettings, limits: Limits, network: str = "cnn4", tensors: bool = True,
    note: str = "", **shape: int,
) -> list[Row]:  # fmt: skip
    """The implicit head in its ways to step and (with ``tensors``) to be called."""
    problem = c.problem(network, **shape)
    steps, asked = {"supervised": outer.supervised(problem)}, {}
    for step, (call, adapt) in product(("newton", "gradient"), list(CALLS.items())[: 1 + tensors]):
        name = f"implicit, {step}, {call}"
        steps[name] = implicit(problem, step, adapt(c.steps), c.cg_steps)
        asked[name] = limits[call]
    case = f"{problem.title}, {problem.head.in_features} features{note}"
    return c.rows(case, c.costs(steps), asked)


def two_threads(c: BenchmarkSettings) -> list[Row]:
    """The same with two threads of torch, the floor too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return against_floor(c, FLOOR, note=", two threads")
    finally:
        torch.set_num_threads(before)


def fifty_shot_chunked(c: BenchmarkSettings) -> list[Row]:
    """Chunks need a backbone without batch statistics: GroupNorm, for the floor too."""
    problem = c.problem("cnn4, GroupNorm", shots=50)
    head, adapt = outer.head_of(problem, "newton", c.cg_steps), closure(c.steps)
    chunks = f"implicit, newton, chunks of {c.chunk_size} images"
    steps = {
        "supervised": outer.supervised(problem),
        "implicit, newton": outer.cached(problem, head, adapt),
        chunks: outer.cached(problem, head, adapt, Chunked(problem.backbone, c.chunk_size)),
    }
    return c.rows(problem.title, c.costs(steps), {chunks: (1.4, 0.25)})


def layouts(c: BenchmarkSettings) -> list[Row]:
    """The floor in ``channels_last`` and in torch's default layout: is it the lowest there is?"""
    steps = {}
    for name in ("channels_last", "contiguous"):
        problem = c.problem(channels_last=name == "channels_last")
        steps[f"supervised, {name}"] = outer.supervised(problem)
        if c.compile:
            compiled = problem._replace(backbone=torch.compile(problem.backbone))
            steps[f"supervised, {name}, compiled"] = outer.supervised(compiled)
    return c.rows(f"layouts: {problem.title}", c.costs(steps))


# Growth with K


def steps_sweep(c: BenchmarkSettings) -> list[Row]:
    """Over K at N = 20."""
    problem, kinds = c.problem(), ("newton", "gradient")
    ours = {f"{kind} {k}": implicit(problem, kind, closure(k), c.cg_steps)
            for kind in kinds for k in c.sweep_steps}  # fmt: skip
    costs = c.costs({"supervised": outer.supervised(problem), **ours})
    case = f"growth with K: {problem.title}"
    rows = [Row(case, "supervised", cost=costs["supervised"])]
    for kind in kinds:
        own = {k: costs[f"{kind} {k}"] for k in c.sweep_steps}
        rows += [Row(case, f"implicit, {kind}", k, c.cg_steps, cost) for k, cost in own.items()]
        bars = (_range("time", [cost.time_ratio for cost in own.values()], GROWTH),
                _range("memory", [cost.peak_bytes for cost in own.values()], FLAT))  # fmt: skip
        rows.append(Row(case, f"implicit, {kind}, whole range", bars=bars))
    return rows


def _range(what: str, values: Sequence[float], limit: float) -> Bar:
    return Bar(f"{what}, largest over smallest", max(values) / min(values), limit)


# Many tasks together, and the head alone


def meta_batch(c: BenchmarkSettings) -> list[Row]:
    """The mean hypergradient of 8 tasks, in the engine of `experiments.train`.

    Over as many supervised steps, one after the other.
    """
    problem = c.problem()
    episodes = [_episode(problem, seed) for seed in range(TASKS)]
    backbone, head = copy.deepcopy(problem.backbone), problem.new_head()

    def supervised() -> None:
        for parameter in (*backbone.parameters(), *head.parameters()):
            parameter.grad = None
        for episode in episodes:
            cross_entropy(head(backbone(episode.inputs)), problem.labels).backward()

    steps: dict[str, Step] = {f"{TASKS} supervised steps": supervised}
    for together, name in (("auto", "heads together"), (False, "one task at a time")):
        steps[f"implicit, newton, {name}"] = _engine(problem, episodes, together, c)
    asked = {"implicit, newton, heads together": (1.02,)}
    return c.rows(f"meta batch of {TASKS}: {problem.title}", c.costs(steps), asked)


def _episode(problem: Problem, seed: int) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty_like(problem.images)  # in its layout
    images.copy_(torch.randn(images.shape, generator=generator))
    return Episode(images, problem.support[1], problem.query[1])


def _engine(
    problem: Problem, episodes: Sequence[Episode], together: object, c: BenchmarkSettings
) -> Step:
    settings = AlgorithmSettings.of(
        {"lr": outer.STEP_SIZE, "together": together, "steps": c.steps, "cg_steps": c.cg_steps}
    )
    measure_of, ways = MEASURES["classification"], problem.head.out_features
    algorithms = make_algorithms(
        settings, copy.deepcopy(problem.backbone), problem.head.in_features, ways, ways,
        measure_of.loss, torch.device(problem.device),
    )  # fmt: skip
    learner = MetaLearner(algorithms, measure_of, "adam", 1e-3, c.channels_last)
    return lambda: learner.hypergradient(episodes) and None


def head_alone(c: BenchmarkSettings) -> list[Row]:
    """What follows the features: inner loop, query loss, and the gradient in the features."""
    problem = c.problem()
    with torch.no_grad():
        many = torch.stack([problem.backbone(_episode(problem, t).inputs) for t in range(TASKS)])

    def one(head: MAML | ImplicitCGHead, adapt: outer.Adapt) -> Step:
        return outer.cached(problem, head, adapt, lambda _: many[0].clone().requires_grad_())

    floor, k = "ANIL (learn2learn), features given", c.steps
    steps = {floor: one(MAML(problem.new_head(), outer.STEP_SIZE), loss_tensors(k))}
    for kind in ("newton", "gradient"):
        head = outer.head_of(problem, kind, c.cg_steps)
        for call, adapt in CALLS.items():
            steps[f"implicit, {kind}, {call}"] = one(head, adapt(k))
        steps[f"implicit, {kind}, a task of {TASKS} together"] = _together(problem, head, many, k)
    costs = c.costs(steps)
    for name in (name for name in costs if name.endswith("together")):
        costs[name] = Cost(*(value / TASKS for value in costs[name]))  # they are those of all
    limits = {"implicit, newton, adapt(closure)": (0.5,),
              f"implicit, newton, a task of {TASKS} together": (0.15,)}  # fmt: skip
    case = f"head alone, {many.shape[2]} features given: {problem.title}"
    first, *rows = c.rows(case, costs, limits)
    return [first._replace(steps=k), *rows]


def _together(problem: Problem, head: ImplicitCGHead, given: Tensor, steps: int) -> Step:
    labels, targets = (t.expand(TASKS, -1) for t in (problem.support[1], problem.query[1]))

    def step() -> None:
        features = given.clone().requires_grad_()
        adapted = head.adapt_together(features[:, : problem.split], labels, steps)
        outputs = adapted(features[:, problem.split :])
        cross_entropy(outputs.flatten(0, 1), targets.flatten(0, 1)).backward()

    return step


# Against the peers


TOGETHER, APART = "implicit, newton", "implicit, newton, support and query apart"
RELEASED_STEPS = {"released step": False, "released step, CG through the backbone": True}


def against_peers(c: BenchmarkSettings) -> list[Row]:
    """Ours and every peer, at each K with N = K.

    A peer that runs support and query apart is held against our step that does so too.
    """
    problem, rows = c.problem(), []
    for k in c.peer_steps:
        steps = {"supervised": outer.supervised(problem)}
        for step in ("newton", "gradient"):
            steps[f"implicit, {step}"] = implicit(problem, step, closure(k), k)
        steps[APART] = outer.apart(problem, outer.head_of(problem, "newton", k), closure(k))
        steps |= {name: peer(problem, k) for name, peer in PEERS.items()}
        for name, everything in RELEASED_STEPS.items():
            steps[name] = outer.released(problem, k, k, everything)
        costs = c.costs(steps)
        for name, cost in costs.items():
            counts = {} if name == "supervised" else {"steps": k}
            counts |= {} if name in ("supervised", *PEERS) else {"cg_steps": k}
            rows.append(Row(f"peers at K = {k}: {problem.title}", name, cost=cost,
                            bars=_duel(k, name, costs), **counts))  # fmt: skip
    return rows


def _duel(k: int, name: str, costs: Mapping[str, Cost]) -> tuple[Bar, ...]:
    """Ours over theirs: never slower, never larger, beyond what a median can tell."""
    if name == "supervised" or name.startswith("implicit"):
        return ()
    ours, theirs = costs[TOGETHER if "cached" in name else APART], costs[name]
    bars = (
        Bar("newton's time", ours.time_ratio / theirs.time_ratio, NEVER_SLOWER),
        Bar("newton's memory", ours.peak_bytes / theirs.peak_bytes, NEVER_LARGER),
    )
    if name in RELEASED_STEPS and k == 20:
        slower = theirs.time_ratio / ours.time_ratio
        return (*bars, Bar("times slower than newton", slower, RELEASED, at_least=True))
    return bars


# iMAML on a whole network


class TimedProduct(ImplicitMAML):
    """`ImplicitMAML` that measures one of its products."""

    cost_of: Callable[[Step], Cost]
    costs: list[Cost]

    def linear_solve(self, hvp: Any, b: Tensor, start: Tensor | None) -> LinearSolution:
        self.costs.append(self.cost_of(lambda: hvp(b)))
        return super().linear_solve(hvp, b, start)


def whole_network(c: BenchmarkSettings) -> list[Row]:
    """iMAML in units of one gradient of the support loss.

    In torch's default layout: the second derivatives of batch norm are slow in ``channels_last``,
    a Hessian-vector product in all.
    """
    problem = c.problem(channels_last=False)
    case, network = f"iMAML, whole network, in gradients: {problem.title}", problem.whole()
    least, most = min(c.network_steps), max(c.network_steps)

    @torch.enable_grad()  # also within a backward pass
    def gradient() -> None:
        cross_entropy(network(problem.support[0]), problem.support[1]).backward()

    steps: dict[str, Step] = {"one gradient, support set": gradient}
    for k, n in [(k, least) for k in c.network_steps] + [(least, most)]:
        settings = _all_products(n)
        learner = ImplicitMAML(network, 0.01, curvature=GaussNewton(), **settings)
        steps[f"iMAML, K = {k}, N = {n}"] = outer.apart(problem, learner, closure(k), outer.IMAGES)
    learner = ImplicitMAML(network, 0.01, **_all_products(least))
    exact = f"iMAML, K = {least}, N = {least}, Hessian"
    steps[exact] = outer.apart(problem, learner, closure(least), outer.IMAGES)
    floor, *rows, hessian = c.rows(case, c.costs(steps))
    bars = [Bar("gradients' memory", row.cost.memory_ratio, GRADIENTS) for row in rows]
    rows = [floor, *(row._replace(bars=(bar,)) for row, bar in zip(rows, bars, strict=True))]
    flat = _range("memory", [row.cost.peak_bytes for row in rows[1:]], FLAT)
    rows += [hessian, Row(case, "all K and N", bars=(flat,))]
    for curvature, limit in ((GaussNewton(), GNP), (Hessian(), HVP)):
        learner = TimedProduct(network, 0.01, curvature=curvature, **_all_products(5))
        learner.cost_of = lambda product: c.costs({"floor": gradient, "": product})[""]
        learner.costs = []  # clones share it
        outer.apart(problem, learner, closure(1), outer.IMAGES)()
        cost = learner.costs[0]
        bars = (Bar("gradients' time", cost.time_ratio, limit),)
        rows.append(Row(case, f"one product, {type(curvature).__name__}", cost=cost, bars=bars))
    return rows


def _all_products(cg_steps: int) -> dict[str, Any]:
    """Gradient steps inside, and a tolerance that conjugate gradient never reaches."""
    return {"inner": GradientDescent(), "linear": CG(cg_steps, 1e-12)}


# By name

_WIDE = partial(against_floor, limits=WIDE, network="cnn4, pooled once")
CASES: dict[str, Case] = {
    "cnn4-32px": partial(against_floor, limits=FLOOR),
    "two-threads": two_threads,
    "wide-20-way-1-shot": partial(_WIDE, tensors=False, ways=20, shots=1),
    "wide-20-way-5-shot": partial(_WIDE, tensors=False, ways=20),
    "meta-batch": meta_batch,
    "head": head_alone,
    "chunked": fifty_shot_chunked,
    "k-sweep": steps_sweep,
    "peers": against_peers,
    "imaml": whole_network,
    "layouts": layouts,
    "resnet12": lambda c: against_floor(c, FLOOR, "resnet12", tensors=False, pixels=84),
}  # fmt: skip


def select(names: str) -> dict[str, Case]:
    """The cases of a list with commas, or ``all``; UserError: no such case."""
    if names == "all":
        return CASES
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    try:
        for name in chosen or [names]:
            choice("cases", name, ["all", *CASES])
    except ValueError as error:
        raise UserError(str(error)) from error
    return {name: CASES[name] for name in chosen}
