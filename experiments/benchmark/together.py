"""A meta batch in the engine of `experiments.train`, and the head's part of a step alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from learn2learn.algorithms import MAML
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.benchmark.cases import Plan
from experiments.benchmark.measure import Cost, measure
from experiments.benchmark.ours import Adapt, Step, closure, head_of, loss_tensors
from experiments.benchmark.problem import STEP_SIZE, Problem, Shape, build
from experiments.benchmark.rows import Bar, Row
from experiments.ingredients.algorithm import make_algorithms
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.training.episodes import Episode
from experiments.training.meta_learner import MEASURES, MetaLearner
from l2l_implicit import ImplicitCGHead

TASKS, BATCH_TIME = 8, 1.02
ONE_HEAD, HEAD_TOGETHER = 0.5, 0.15


def meta_batch(plan: Plan) -> list[Row]:
    """The mean hypergradient of 8 tasks, over as many supervised steps, one after the other."""
    shape = Shape(hidden=plan.hidden)
    problem = build(shape, plan.setting)
    episodes = [_episode(problem, seed) for seed in range(TASKS)]
    steps: dict[str, Step] = {f"{TASKS} supervised steps": _supervised(problem, episodes)}
    for together, name in (("auto", "heads together"), (False, "one task at a time")):
        steps[f"implicit, newton, {name}"] = _engine(problem, episodes, together, plan)
    costs = measure(steps, plan.effort, plan.setting.device)
    case = f"meta batch of {TASKS}: {shape.title}"
    rows = []
    for name, cost in costs.items():
        bars = (Bar("time", cost.time_ratio, BATCH_TIME),) if name.endswith("together") else ()
        row = Row(case, name, cost=cost, bars=bars)
        ours = name.startswith("implicit")
        rows.append(row._replace(steps=plan.steps, cg_steps=plan.cg_steps) if ours else row)
    return rows


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

    def step() -> None:
        learner.hypergradient(episodes)

    return step


def head_alone(plan: Plan) -> list[Row]:
    """What follows the features: inner loop, query loss, and the gradient in the features."""
    shape = Shape(hidden=plan.hidden)
    problem = build(shape, plan.setting)
    with torch.no_grad():
        many = torch.stack([problem.backbone(_episode(problem, t).inputs) for t in range(TASKS)])
    given, k, n = many[0], plan.steps, plan.cg_steps
    floor = "ANIL (learn2learn), features given"
    anil = MAML(problem.new_head(), STEP_SIZE)
    steps: dict[str, Step] = {floor: _on_features(problem, anil, given, loss_tensors(k))}
    for kind in ("newton", "gradient"):
        head = head_of(problem, kind, n)
        for name, adapt in (("adapt(closure)", closure(k)), ("adapt(loss)", loss_tensors(k))):
            steps[f"implicit, {kind}, {name}"] = _on_features(problem, head, given, adapt)
        steps[f"implicit, {kind}, a task of {TASKS} together"] = _together(problem, head, many, k)
    costs = measure(steps, plan.effort, plan.setting.device)
    case = f"head alone, {given.shape[1]} features given: {shape.title}"
    return [_row(case, name, cost, plan) for name, cost in costs.items()]


def _row(case: str, name: str, cost: Cost, plan: Plan) -> Row:
    limit = ONE_HEAD if name == "implicit, newton, adapt(closure)" else None
    if name.endswith("together"):  # time and memory are those of all of them
        cost = Cost(*(value / TASKS for value in cost))
        limit = HEAD_TOGETHER if "newton" in name else None
    cg_steps = plan.cg_steps if name.startswith("implicit") else None
    bars = () if limit is None else (Bar("time", cost.time_ratio, limit),)
    return Row(case, name, plan.steps, cg_steps, cost, bars)


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
