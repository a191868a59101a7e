"""What is measured, case by case, and the bars. A case is a function of the `Plan` -> rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from learn2learn.algorithms import MAML
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.benchmark import steps as outer
from experiments.benchmark.measure import Cost, Effort, growth, measure, seconds_of, warm_peak
from experiments.benchmark.problem import STEP_SIZE, Problem, Setting, Shape, build
from experiments.benchmark.steps import Adapt, Step, closure, head_of, implicit, loss_tensors
from experiments.benchmark.table import Bar, Row
from experiments.ingredients.algorithm import make_algorithms, solvers
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.tracking import UserError
from experiments.training.episodes import Episode
from experiments.training.meta_learner import MEASURES, MetaLearner
from l2l_implicit import ImplicitCGHead, ImplicitMAML, LinearSolution, checks

GROWTH, FLAT = 1.10, 1.01  # over all K or N: of time, of memory
CHUNKED_TIME, CHUNKED_MEMORY = 1.4, 0.25
TASKS, BATCH_TIME = 8, 1.02
ONE_HEAD, HEAD_TOGETHER = 0.5, 0.15
RELEASED, NEVER_SLOWER, NEVER_LARGER = 5.0, 1.01, 1.01
GRADIENTS, HVP = 2.5, 2.2  # memory of an iMAML step and time of a product, in gradients


class Limits(NamedTuple):
    """Of time by ``adapt(closure)`` and by ``adapt(loss)``, and of memory, over the floor's."""

    closure: float
    tensors: float
    memory: float | None = None


FLOOR, OTHER, WIDE = Limits(1.05, 1.08, 1.01), Limits(1.10, 1.10), Limits(1.05, 1.10)


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

    def problem(self, network: str = "cnn4", **shape: int) -> tuple[str, Problem]:
        """A task's title, and the task."""
        wanted = Shape(network, **{"hidden": self.hidden, **shape})
        return wanted.title, build(wanted, self.setting)


Case = Callable[[Plan], list[Row]]
Bars = Callable[[str, Mapping[str, Cost]], tuple[Bar, ...]]


def compared(
    case: str, plan: Plan, steps: Mapping[str, Step], bars: Bars = lambda name, costs: ()
) -> list[Row]:
    """One row a method, the floor first; ours with the plan's K and N."""
    costs = measure(steps, plan.effort, plan.setting.device)
    rows = [Row(case, name, cost=cost, bars=bars(name, costs)) for name, cost in costs.items()]
    counts = {"steps": plan.steps, "cg_steps": plan.cg_steps}
    return [row._replace(**counts) if row.method.startswith("implicit") else row for row in rows]


# Against the floor, one supervised step


def against_floor(
    plan: Plan, limits: Limits, network: str = "cnn4", tensors: bool = True, note: str = "",
    **shape: int,
) -> list[Row]:  # fmt: skip
    """The implicit head in its ways to step and (with ``tensors``) to be called."""
    title, problem = plan.problem(network, **shape)
    calls = {"adapt(closure)": closure(plan.steps)}
    if tensors:
        calls["adapt(loss)"] = loss_tensors(plan.steps)
    steps = {"supervised": outer.supervised(problem)}
    for step in ("newton", "gradient"):
        for call, adapt in calls.items():
            steps[f"implicit, {step}, {call}"] = implicit(problem, step, adapt, plan.cg_steps)

    def bars(name: str, costs: Mapping[str, Cost]) -> tuple[Bar, ...]:
        if not name.startswith("implicit"):
            return ()
        time = limits.tensors if name.endswith("adapt(loss)") else limits.closure
        return over_floor(costs[name], time, limits.memory)

    width = problem.head.in_features
    return compared(f"{title}, {width} features{note}", plan, steps, bars)


def over_floor(cost: Cost, time: float, memory: float | None = None) -> tuple[Bar, ...]:
    bar = Bar("time", cost.time_ratio, time)
    return (bar,) if memory is None else (bar, Bar("memory", cost.memory_ratio, memory))


def two_threads(plan: Plan) -> list[Row]:
    """The same with two threads of torch, the floor too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return against_floor(plan, FLOOR, note=", two threads")
    finally:
        torch.set_num_threads(before)


def fifty_shot_chunked(plan: Plan) -> list[Row]:
    """Chunks need a backbone without batch statistics: GroupNorm, for the floor too."""
    title, problem = plan.problem("cnn4, GroupNorm", shots=50)
    adapt, chunks = closure(plan.steps), f"implicit, newton, chunks of {plan.chunk_size} images"
    head = head_of(problem, "newton", plan.cg_steps)
    steps = {
        "supervised": outer.supervised(problem),
        "implicit, newton": implicit(problem, "newton", adapt, plan.cg_steps),
        chunks: outer.chunked(problem, head, adapt, plan.chunk_size),
    }

    def bars(name: str, costs: Mapping[str, Cost]) -> tuple[Bar, ...]:
        return over_floor(costs[name], CHUNKED_TIME, CHUNKED_MEMORY) if name == chunks else ()

    return compared(title, plan, steps, bars)


def layouts(plan: Plan, compile: bool = False) -> list[Row]:
    """The floor in ``channels_last`` and in torch's default layout: is it the lowest there is?

    Args:
        plan: the configuration.
        compile: also by ``torch.compile``, which needs a C++ compiler and half a minute.
    """
    steps = {}
    for name, channels_last in (("channels_last", True), ("contiguous", False)):
        setting = plan.setting._replace(channels_last=channels_last)
        title, problem = plan._replace(setting=setting).problem()
        steps[f"supervised, {name}"] = outer.supervised(problem)
        if compile:
            compiled = problem._replace(backbone=torch.compile(problem.backbone))
            steps[f"supervised, {name}, compiled"] = outer.supervised(compiled)
    return compared(f"layouts: {title}", plan, steps)


# Growth with K and N


def steps_sweep(plan: Plan) -> list[Row]:
    """Time over K at N = 20."""
    return _sweep("K", [plan._replace(steps=k) for k in plan.sweep_steps])


def cg_steps_sweep(plan: Plan) -> list[Row]:
    """Time over N at K = 20; once as it is used, once with a tolerance that is never reached.

    Newton's backward pass uses the factor of its inner solve: it takes no such step.
    """
    plans = [plan._replace(cg_steps=n) for n in plan.sweep_cg_steps]
    return _sweep("N", plans) + _sweep("N, all of them (cg_tol = 1e-12)", plans, cg_tol=1e-12)


def _sweep(what: str, plans: Sequence[Plan], **settings: float) -> list[Row]:
    title, problem = plans[0].problem()
    case, steps = f"growth with {what}: {title}", {"supervised": outer.supervised(problem)}
    names = {
        (step, each): f"implicit, {step}, K = {each.steps}, N = {each.cg_steps}"
        for step in ("newton", "gradient")
        for each in plans
    }
    for (step, each), name in names.items():
        steps[name] = implicit(problem, step, closure(each.steps), each.cg_steps, **settings)
    costs = measure(steps, plans[0].effort, plans[0].setting.device)
    rows = [Row(case, "supervised", cost=costs["supervised"])]
    for step in ("newton", "gradient"):
        group = {each: costs[names[step, each]] for each in plans}
        rows += [Row(case, f"implicit, {step}", each.steps, each.cg_steps, cost)
                 for each, cost in group.items()]  # fmt: skip
        bar = Bar("time, largest over smallest", growth(group.values()), GROWTH)
        rows.append(Row(case, f"implicit, {step}, whole range", bars=(bar,)))
    return rows


def steps_memory(plan: Plan) -> list[Row]:
    """Peak memory over K: gradient steps, which are all taken, by closure and by loss tensors."""
    title, problem = plan.problem()
    case, device = f"memory over K: {title}", plan.setting.device
    floor = warm_peak(outer.supervised(problem), device)
    rows = [Row(case, "supervised", cost=Cost.of_memory(floor, floor))]
    for call, adapt in (("adapt(closure)", closure), ("adapt(loss)", loss_tensors)):
        name, peaks = f"implicit, gradient, {call}", []
        for k in plan.memory_steps:
            step = implicit(problem, "gradient", adapt(k), plan.cg_steps)
            peaks.append(warm_peak(step, device))
            rows.append(Row(case, name, k, plan.cg_steps, Cost.of_memory(peaks[-1], floor)))
        rows.append(Row(case, f"{name}, whole range", bars=(_flat(peaks),)))
    return rows


def _flat(peaks: Sequence[float]) -> Bar:
    return Bar("memory, largest over smallest", max(peaks) / min(peaks), FLAT)


# Many tasks together, and the head alone


def meta_batch(plan: Plan) -> list[Row]:
    """The mean hypergradient of 8 tasks, in the engine of `experiments.train`.

    Over as many supervised steps, one after the other.
    """
    title, problem = plan.problem()
    episodes = [_episode(problem, seed) for seed in range(TASKS)]
    steps: dict[str, Step] = {f"{TASKS} supervised steps": _supervised(problem, episodes)}
    for together, name in (("auto", "heads together"), (False, "one task at a time")):
        steps[f"implicit, newton, {name}"] = _engine(problem, episodes, together, plan)

    def bars(name: str, costs: Mapping[str, Cost]) -> tuple[Bar, ...]:
        return over_floor(costs[name], BATCH_TIME) if name.endswith("together") else ()

    return compared(f"meta batch of {TASKS}: {title}", plan, steps, bars)


def _episode(problem: Problem, seed: int) -> Episode:
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty_like(problem.images)  # in its layout
    images.copy_(torch.randn(images.shape, generator=generator))
    return Episode(images, problem.support[1], problem.query[1])


def _supervised(problem: Problem, episodes: Sequence[Episode]) -> Step:
    backbone, head = copy.deepcopy(problem.backbone), problem.new_head()
    parameters = [*backbone.parameters(), *head.parameters()]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        for episode in episodes:
            cross_entropy(head(backbone(episode.inputs)), problem.labels).backward()

    return step


def _engine(problem: Problem, episodes: Sequence[Episode], together: object, plan: Plan) -> Step:
    settings = AlgorithmSettings.of(
        {"lr": STEP_SIZE, "together": together, "steps": plan.steps, "cg_steps": plan.cg_steps}
    )
    measure_of, ways = MEASURES["classification"], problem.head.out_features
    algorithms = make_algorithms(
        settings, copy.deepcopy(problem.backbone), problem.head.in_features, ways, ways,
        measure_of.loss, torch.device(problem.device),
    )  # fmt: skip
    learner = MetaLearner(algorithms, measure_of, "adam", 1e-3, plan.setting.channels_last)
    return lambda: learner.hypergradient(episodes) and None


def head_alone(plan: Plan) -> list[Row]:
    """What follows the features: inner loop, query loss, and the gradient in the features."""
    title, problem = plan.problem()
    with torch.no_grad():
        many = torch.stack([problem.backbone(_episode(problem, t).inputs) for t in range(TASKS)])
    given, k = many[0], plan.steps
    floor, anil = "ANIL (learn2learn), features given", MAML(problem.new_head(), STEP_SIZE)
    steps: dict[str, Step] = {floor: _on_features(problem, anil, given, loss_tensors(k))}
    for kind in ("newton", "gradient"):
        head = head_of(problem, kind, plan.cg_steps)
        for name, adapt in (("adapt(closure)", closure(k)), ("adapt(loss)", loss_tensors(k))):
            steps[f"implicit, {kind}, {name}"] = _on_features(problem, head, given, adapt)
        steps[f"implicit, {kind}, a task of {TASKS} together"] = _together(problem, head, many, k)
    rows = compared(f"head alone, {given.shape[1]} features given: {title}", plan, steps)
    rows[0] = rows[0]._replace(steps=k)
    return [_of_one_task(row) for row in rows]


def _of_one_task(row: Row) -> Row:
    cost, limit = row.cost, ONE_HEAD if row.method == "implicit, newton, adapt(closure)" else None
    if row.method.endswith("together"):  # time and memory are those of all of them
        cost = Cost(*(value / TASKS for value in cost))
        limit = HEAD_TOGETHER if "newton" in row.method else None
    return row._replace(cost=cost, bars=() if limit is None else over_floor(cost, limit))


def _on_features(
    problem: Problem, head: MAML | ImplicitCGHead, given: Tensor, adapt: Adapt
) -> Step:
    def step() -> None:
        features, learner = given.clone().requires_grad_(), head.clone()
        adapt(learner, features[: problem.split], problem.support[1])
        cross_entropy(learner(features[problem.split :]), problem.query[1]).backward()

    return step


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
PEERS: dict[str, Callable[[Problem, int], Step]] = {
    "ANIL (learn2learn), features cached": outer.anil,
    "ITD-BiO, features cached": outer.itd_bio,
    "higher, head, features cached": outer.higher_head,
    "ANIL (learn2learn), as published": outer.anil_as_published,
    "ITD-BiO, as published": outer.itd_bio_as_published,
    "MAML (learn2learn), whole network": outer.maml,
}
RELEASED_STEPS = {"released step": False, "released step, CG through the backbone": True}


def against_peers(plan: Plan) -> list[Row]:
    """Ours and every peer, at each K with N = K.

    A peer that runs support and query apart is held against our step that does so too.
    """
    title, problem = plan.problem()
    rows = []
    for k in plan.peer_steps:
        steps = {"supervised": outer.supervised(problem)}
        for step in ("newton", "gradient"):
            steps[f"implicit, {step}"] = implicit(problem, step, closure(k), k)
        steps[APART] = outer.apart(problem, head_of(problem, "newton", k), closure(k))
        steps |= {name: peer(problem, k) for name, peer in PEERS.items()}
        for name, everything in RELEASED_STEPS.items():
            steps[name] = outer.released(problem, k, k, everything)
        same, case = plan._replace(steps=k, cg_steps=k), f"peers at K = {k}: {title}"
        for row in compared(case, same, steps, partial(_duel, k)):
            counts = {"steps": k, "cg_steps": k if row.method in RELEASED_STEPS else row.cg_steps}
            rows.append(row if row.method == "supervised" else row._replace(**counts))
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


class TimedSolve(ImplicitMAML):
    """`ImplicitMAML` that takes the time of its Hessian-vector products."""

    seconds: list[float]

    def linear_solve(self, hvp: Any, b: Tensor, start: Tensor | None) -> LinearSolution:
        def timed(vector: Tensor) -> Tensor:
            products: list[Tensor] = []
            taken = seconds_of(lambda: products.append(hvp(vector)), str(vector.device))
            self.seconds.append(taken)
            return products[0]

        return super().linear_solve(timed, b, start)


def whole_network(plan: Plan) -> list[Row]:
    """iMAML in units of one gradient of the support loss.

    In torch's default layout: the second derivatives of batch norm are slow in ``channels_last``,
    a Hessian-vector product in all.
    """
    setting = plan.setting._replace(channels_last=False)
    title, problem = plan._replace(setting=setting).problem()
    case, network = f"iMAML, whole network, in gradients: {title}", problem.whole()
    least, most = min(plan.network_steps), max(plan.network_steps)
    steps: dict[str, Step] = {"one gradient, support set": _gradient(problem, network)}
    for k, n in [(k, least) for k in plan.network_steps] + [(least, most)]:
        learner = ImplicitMAML(network, 0.01, **_all_products(n))
        steps[f"iMAML, K = {k}, N = {n}"] = outer.whole(problem, learner, closure(k))

    def bars(name: str, costs: Mapping[str, Cost]) -> tuple[Bar, ...]:
        bar = Bar("gradients' memory", costs[name].memory_ratio, GRADIENTS)
        return (bar,) if name.startswith("iMAML") else ()

    rows = compared(case, plan, steps, bars)
    flat = _flat([row.cost.peak_bytes for row in rows[1:]])
    return [*rows, Row(case, "all K and N", bars=(flat,)), _products(case, problem, network)]


def _all_products(cg_steps: int) -> dict[str, Any]:
    """Gradient steps inside, and a tolerance that conjugate gradient never reaches."""
    return solvers(step="gradient", cg_steps=cg_steps, cg_tol=1e-12)


def _gradient(problem: Problem, network: nn.Module) -> Step:
    images, labels = problem.support
    return lambda: cross_entropy(network(images), labels).backward()


def _products(case: str, problem: Problem, network: nn.Module) -> Row:
    """A Hessian-vector product's time, each next to a gradient's."""
    parent = TimedSolve(network, 0.01, **_all_products(5))
    parent.seconds = []  # clones share it
    step, gradient = outer.whole(problem, parent, closure(1)), _gradient(problem, network)
    step()
    ratios, products = [], []
    for _ in range(3):
        parent.seconds.clear()
        alone = min(seconds_of(gradient, problem.device) for _ in range(5))
        step()
        products.append(min(parent.seconds))
        ratios.append(products[-1] / alone)
    ratio = sorted(ratios)[1]
    cost = Cost(sorted(products)[1], math.nan, ratio, math.nan)
    bars = (Bar("gradients' time", ratio, HVP),)
    return Row(case, "one Hessian-vector product", cost=cost, bars=bars)


# By name


def small_images(plan: Plan) -> list[Row]:
    return against_floor(plan, FLOOR, pixels=84, hidden=min(32, plan.hidden))


POOLED_ONCE = "cnn4, pooled once"
CASES: dict[str, Case] = {
    "cnn4-32px": partial(against_floor, limits=FLOOR),
    "two-threads": two_threads,
    "cnn4-84px": small_images,
    "20-way": partial(against_floor, limits=OTHER, ways=20),
    "20-shot": partial(against_floor, limits=OTHER, shots=20),
    "wide": partial(against_floor, limits=WIDE, network=POOLED_ONCE),
    "wide-20-way-1-shot": partial(
        against_floor, limits=WIDE, network=POOLED_ONCE, tensors=False, ways=20, shots=1
    ),
    "wide-20-way-5-shot": partial(
        against_floor, limits=WIDE, network=POOLED_ONCE, tensors=False, ways=20
    ),
    "meta-batch": meta_batch,
    "head": head_alone,
    "chunked": fifty_shot_chunked,
    "k-sweep": steps_sweep,
    "n-sweep": cg_steps_sweep,
    "k-memory": steps_memory,
    "peers": against_peers,
    "imaml": whole_network,
    "layouts": layouts,
    "resnet12": partial(
        against_floor, limits=FLOOR, network="resnet12", tensors=False, pixels=84
    ),
    "resnet12-wide": partial(
        against_floor, limits=OTHER, network="resnet12, 16,000 features", tensors=False,
        pixels=84,
    ),
}  # fmt: skip
OPTIONAL: dict[str, Case] = {"compile": partial(layouts, compile=True)}


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
