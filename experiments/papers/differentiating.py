r"""Ways to differentiate, side by side: what they cost and how wrong they are.

    python -m experiments.papers.differentiating
    python -m experiments.papers.differentiating with quick
    python -m experiments.papers.differentiating with parts='["features"]' \
        parameters='["runs/1/parameters.pt"]' root=DATA

Four parts. ``systems``: preconditioners on ill-conditioned linear systems. ``features``: fixed
numbers of steps against ``accuracy``, on CIFAR-FS and the features of ``parameters``.
``network``: the linear system of a CNN4 on Omniglot a few gradient steps from theta. ``time``:
error against time, on a head and on a small network, as a picture.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.ingredients.model import ModelSettings, build_backbone, within_limits
from experiments.ingredients.tasks import make_tasks
from experiments.papers import PaperSettings, Points
from experiments.papers.hypergradient import Classification, Problem
from experiments.report.figures import draw_panels
from experiments.tracking import TrackedExperiment, wrong
from experiments.tracking.config import MOST, Count, OfTuple, Positive, Text
from experiments.tracking.errors import reason
from experiments.training.checkpoint import plain_data
from l2l_implicit import (
    CG,
    LBFGS,
    Direct,
    GradientDescent,
    Hessian,
    Identity,
    ImplicitCGHead,
    ImplicitMAML,
    InnerSolver,
    Jacobi,
    Kronecker,
    LinearSolver,
    Neumann,
    Newton,
    Nystrom,
    Perturbed,
    UnsolvedWarning,
)
from l2l_implicit.baselines import UnrolledMAML
from l2l_implicit.inner_problem.linear_heads import LinearHeads
from l2l_implicit.inner_problem.linearization import SquaredDistance
from l2l_implicit.inner_problem.losses import CrossEntropy, OutputLoss, SquaredError
from l2l_implicit.inner_problem.recognition import HeadLoss
from l2l_implicit.linear_solvers.curvature import largest_curvature
from l2l_implicit.linear_solvers.solution import System

PARTS = ("systems", "features", "network", "time")
Tables = Iterator[tuple[str, pd.DataFrame]]
"""By title; a row a way, a column a figure."""


class DifferentiatingSettings(PaperSettings):
    """The settings of this experiment."""

    parts: Annotated[list[Literal[PARTS]], Field(min_length=1), OfTuple] = [
        "systems", "network", "time",
    ]  # fmt: skip
    repetitions: Count = 3  # of what is timed: medians of processor time
    # systems
    width: Count = 16384  # features of a few-shot head
    samples: Annotated[int, Field(ge=5, le=MOST)] = 125  # of it, in five classes
    conditions: Annotated[list[Positive], Field(min_length=1), OfTuple] = [1e4, 1e6, 1e8]
    most: Count = 3000  # steps of conjugate gradient
    # features: what runs of experiments.train left, in this order
    parameters: list[str] = []
    root: Text = "data"  # folder of the data sets
    tasks: Count = 5  # of either data set
    # network
    filters: Count = 8  # a layer

    @model_validator(mode="after")
    def _have_features(self) -> DifferentiatingSettings:
        if "features" in self.parts and not self.parameters:
            raise wrong("parameters", "files that runs left, for the part features", "none",
                        "train one, or leave the part out")
        return self


ex = TrackedExperiment("differentiating", settings=DifferentiatingSettings)


@ex.named_config
def quick() -> None:
    """The parts that need no data, small: seconds."""
    parts, repetitions = ["systems", "time"], 1
    width, samples, conditions, most = 256, 25, [1e4], 300


def timed(repetitions: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """The median of this process's processor time in milliseconds, and the last answer."""
    seconds = []
    for _ in range(repetitions):
        begin = time.process_time()
        found = run()
        seconds.append(time.process_time() - begin)
    return 1e3 * statistics.median(seconds), found


def error_of(got: Tensor, truth: Tensor) -> float:
    return float((got - truth).norm() / truth.norm())


def number(value: float) -> str:
    """For people: ``above 1e5``, ``150``, ``3``, ``0.012``."""
    if value >= 1e5:
        return "above 1e5"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


# Preconditioners.

L2 = 1e-6
PRECONDITIONERS = {"CG": None, "Jacobi": Jacobi(), "Nystrom(50)": Nystrom(50),
                   "Kronecker": Kronecker()}  # fmt: skip


def head(
    x: Tensor, labels: Tensor, kind: type[OutputLoss], condition: float, steps: int
) -> LinearHeads:
    """Five classes on features that are scaled so that L / l2 is ``condition`` at zero.

    At the minimum, or after ``steps`` gradient steps of size 1 / L.
    """
    share = 0.2 if kind is CrossEntropy else 0.4  # of the loss in its outputs, times 1 / m
    largest = share * float(torch.linalg.matrix_norm(x, 2).square()) / len(x)
    x = x * math.sqrt(condition * L2 / largest)
    targets = labels if kind is CrossEntropy else nn.functional.one_hot(labels, 5).double()
    scale = 1.0 / len(x) / (1 if kind is CrossEntropy else 5)
    known = HeadLoss(x, None, None, False, targets, kind, scale)
    weight = torch.zeros(5, x.shape[1], dtype=torch.float64)
    at = known.heads([weight], SquaredDistance(L2, [], torch.float64))
    if not steps:
        solved = Newton().solve_heads(at, 1, 1.0)
        assert solved is not None
        return at.moved(solved.point)
    step = GradientDescent(adaptive=True).begin(1.0)
    for _ in range(steps):
        at = at.moved(step(at))
    return at


def exactly(at: LinearHeads, b: Tensor) -> Tensor:
    """``H^-1 b`` by a dense factor, of phi or in the span of the samples."""
    if b.shape[1] <= 4096:
        return Direct().solve(at.hvp, b).solution
    inverse = at.loss.inverse(at.problem.gram() / L2)
    return (b - at.problem.in_phi(inverse(at.problem.outputs(b) / L2))) / L2


def systems(c: DifferentiatingSettings) -> Tables:
    """Steps, time and error of conjugate gradient with and without each preconditioner."""
    draw = torch.Generator().manual_seed(c.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    def data(samples: int, width: int, wrong: float) -> tuple[Tensor, Tensor]:
        """Features whose sizes fall by a factor of 30, and labels some of which are wrong."""
        labels = torch.arange(samples) % 5
        x = 0.5 * normal(5, width)[labels] + normal(samples, width)
        noise = torch.rand(samples, generator=draw) < wrong
        labels = torch.where(noise, torch.randint(5, (samples,), generator=draw), labels)
        return x * torch.logspace(0, -1.5, width, dtype=torch.float64), labels

    few, many = data(c.samples, c.width, 0.0), 16 * c.samples
    kinds: dict[str, tuple[tuple[Tensor, Tensor], type[OutputLoss], int]] = {
        f"squared error, {c.samples} samples, {c.width} features": (few, SquaredError, 0),
        "the same with cross-entropy, after 20 gradient steps": (few, CrossEntropy, 20),
        f"cross-entropy, {many} samples, 64 features": (data(many, 64, 0.3), CrossEntropy, 0),
        "the same with labels that features tell": (data(many, 64, 0.0), CrossEntropy, 0),
    }
    for title, (samples, kind, steps) in kinds.items():
        for condition in c.conditions:
            at = head(*samples, kind, condition, steps)
            query = normal(10, samples[0].shape[1]) * samples[0].std(0)
            b = at.problem._replace(x=query.unsqueeze(0)).in_phi(normal(1, 10, 5))
            truth, system, rows = exactly(at, b), System(at.hvp, 0.0, at, 1e-2), {}
            for name, preconditioner in PRECONDITIONERS.items():
                solver = CG(c.most, preconditioner=preconditioner)
                ms, answer = timed(c.repetitions, partial(solver.solve, system, b))
                error = error_of(answer.solution, truth)
                rows[name] = {"products": float(answer.steps), "ms": ms, "error": error}
            real = 1.0 + float(largest_curvature(at.hvp, b, 30)) / L2
            title_of = f"{title}, L / l2 = {condition:.0e} at zero, {real:.1e} here"
            yield title_of, pd.DataFrame(rows).T


# Accuracy instead of steps.

INNER: dict[str, InnerSolver] = {
    "gradient": GradientDescent(adaptive=True), "L-BFGS": LBFGS(), "Newton": Newton(),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "20, 20": {}, **{f"{a:g}": {"accuracy": a} for a in (1e-1, 1e-2, 1e-3)}
}  # fmt: skip


def features(c: DifferentiatingSettings) -> Tables:
    """K, N, time and true error on CIFAR-FS, 5-way 5-shot, for the features of each file."""
    given = make_tasks(name="cifarfs", root=c.root)
    torch.manual_seed(c.seed)  # of the initial heads
    for path in c.parameters:
        try:
            if not Path(path).is_file():
                raise OSError("no such file")
            state = plain_data(Path(path).read_bytes())["backbone"]
            settings = ModelSettings(name="cnn4", hidden=len(state["0.conv.bias"]))
            backbone, _ = build_backbone(given.input_shape(), settings)
            backbone.load_state_dict(state)
        except Exception as error:  # torch's reader of plain data raises what its bytes lead to
            raise wrong("parameters", "a file that a run of a cnn4 on CIFAR-FS left",
                        f"{path}: {reason(error)}", "train one") from error
        stream, rows = given.stream("test", c.seed), list[dict[str, Any]]()
        for _ in range(c.tasks):
            episode = stream.sample()
            with torch.no_grad():
                h = backbone(episode.inputs)
            rows += one_task(h, episode.support_targets, episode.query_targets, c.repetitions)
        size = float(h.norm(dim=1).mean())
        table = pd.DataFrame(rows).groupby("way", sort=False).mean()
        yield f"features of {path}, of length {size:.1f}", table


def one_task(h: Tensor, y: Tensor, query_y: Tensor, repetitions: int) -> Iterator[dict[str, Any]]:
    """A row for each way to solve the inner problem of one task's head."""
    start, m = nn.Linear(h.shape[1], 5), len(y)

    def hypergradient(leaf: Tensor, steps: int, **settings: Any) -> tuple[Tensor, Any]:
        module = copy.deepcopy(start).to(leaf.dtype)
        learner = ImplicitCGHead(module, 0.1, max_error=1e9, **settings).clone()
        learner.adapt(lambda: cross_entropy(learner(leaf[:m]), y), steps=steps)
        loss = cross_entropy(learner(leaf[m:]), query_y)
        return torch.autograd.grad(loss, leaf)[0], learner.diagnostics

    truth = hypergradient(h.double().requires_grad_(), 1)[0]
    for inner, solver in INNER.items():
        for name, settings in WAYS.items() if inner != "Newton" else [("20, 20", {})]:
            steps, linear = (5000, CG(1000)) if settings else (20, CG())
            run = partial(hypergradient, h.clone().requires_grad_(), steps, inner=solver,
                          linear=linear, **settings)  # fmt: skip
            ms, (got, said) = timed(repetitions, run)
            yield {"way": f"{inner}, {name}", "K": said.inner_steps, "N": said.cg_steps, "ms": ms,
                   "error": error_of(got.double(), truth),
                   "said": said.hypergradient_error}  # fmt: skip


# A whole network.


class Network(Problem):
    """A network, all of it adapted and anchored at the initial value, which is theta."""

    kind = ImplicitMAML

    def __init__(
        self, module: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], l2: float,
        lr: float,
    ) -> None:  # fmt: skip
        self.module, self.inputs, self.targets, self.l2, self.lr = module, inputs, targets, l2, lr
        self.theta = nn.utils.parameters_to_vector(module.parameters()).detach()


def small_network(seed: int) -> Network:
    """Two layers on the features of a problem of `Classification`."""
    task = Classification(5, 5, 16, 0.1, seed)
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    inputs = task.features(task.theta.detach())
    return Network(module, inputs, task.targets, 0.1, 0.5)


def network(c: DifferentiatingSettings) -> Tables:
    """Against the derivative of 16 gradient steps, on Omniglot, 5-way 1-shot, at random theta."""
    given = make_tasks(name="omniglot", root=c.root, shots=1, queries=1)
    torch.manual_seed(c.seed)
    settings = ModelSettings(name="cnn4", hidden=c.filters, channels_last=False)
    backbone, width = build_backbone(given.input_shape(), settings)
    net, l2, lr = nn.Sequential(backbone, nn.Linear(width, 5)).double(), 2.0, 0.1
    ways: dict[str, LinearSolver] = {
        "CG(5)": CG(5), "CG(20)": CG(20), "CG(5, damping=20)": CG(5, damping=20.0),
        "CG(20, damping=20)": CG(20, damping=20.0),
        "CG(20, truncated=True)": CG(20, truncated=True),
        "Identity(1 / l2)": Identity(1 / l2),
    }  # fmt: skip
    stream, rows = given.stream("train", c.seed), []
    for _ in range(c.tasks):
        episode = stream.sample()
        x, targets = episode.inputs.double(), (episode.support_targets, episode.query_targets)
        task = Network(net, x.split([len(each) for each in targets]), targets, l2, lr)
        truth, _ = task.differentiate(UnrolledMAML(copy.deepcopy(net), lr), 16, penalty=True)
        for name, linear in ways.items():
            learner = ImplicitMAML(copy.deepcopy(net), lr, l2=l2, linear=linear,
                                   curvature=Hessian())  # fmt: skip
            got, _ = task.differentiate(learner, 16, penalty=False)
            rows.append({"way": name, "cosine": float(torch.cosine_similarity(got, truth, 0)),
                         "size": float(got.norm() / truth.norm()),
                         "products": learner.diagnostics.cg_steps})  # fmt: skip
    table = pd.DataFrame(rows).groupby("way", sort=False).agg(
        cosine=("cosine", "median"), least=("cosine", "min"), size=("size", "median"),
        largest=("size", "max"), products=("products", "mean"),
    )  # fmt: skip
    yield f"a CNN4 with {c.filters} filters, 16 steps from theta", table


# Error against time.


class Way(NamedTuple):
    """A way to differentiate, with the budgets that its curve runs through.

    Attributes:
        budgets: steps, ranks or accuracies.
        learner: from a problem and a budget.
        unrolled: the budget is K; else an inner solver ends by itself.
    """

    budgets: Sequence[float]
    learner: Callable[[Problem, Any], Any]
    unrolled: bool = False

    def measured(self, task: Problem, budget: Any) -> tuple[Tensor, float]:
        """The hypergradient and its milliseconds, see `Problem.differentiate`."""
        steps = budget if self.unrolled else 500
        return task.differentiate(self.learner(task, budget), steps, penalty=self.unrolled)


SOLVED = LBFGS(tol=1e-10)


def implicit(task: Problem, linear: LinearSolver, inner: InnerSolver = SOLVED, **more: Any) -> Any:
    """The learner with an inner problem that is solved, by L-BFGS, which leaves no factor."""
    return task.implicit(inner=inner, linear=linear, curvature=Hessian(), **more)


NUMBERS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80)
MANY = (1, 3, 10, 30, 100, 300)
CURVES: dict[str, Way] = {
    "conjugate gradient": Way(NUMBERS, lambda task, n: implicit(task, CG(n, 1e-14))),
    "preconditioned": Way(NUMBERS, lambda task, n: implicit(
        task, CG(n, 1e-14, preconditioner=Jacobi() if task.anchored else Kronecker()))),
    "Nystrom": Way(NUMBERS, lambda task, n: implicit(task, Nystrom(n))),
    "one step": Way((1,), lambda task, _: implicit(task, Identity(task.lr))),
    "Neumann": Way(MANY, lambda task, n: implicit(task, Neumann(n, 1e-14))),
    "unrolled": Way(MANY, lambda task, _: task.unrolled(), unrolled=True),
    "accuracy": Way((0.3, 1e-1, 1e-2, 1e-3, 1e-4), lambda task, accuracy: implicit(
        task, CG(500), LBFGS(), accuracy=accuracy)),
    "perturbed": Way(NUMBERS[2:], lambda task, n: implicit(task, Perturbed(steps=n, tol=1e-14))),
}  # fmt: skip


def against_time(c: DifferentiatingSettings) -> Tables:
    """Processor time of the backward pass, and the error, for each budget of each way."""
    problems = {"head": Classification(5, 10, 64, 1e-3, c.seed), "network": small_network(c.seed)}
    for title, task in problems.items():
        truth, rows = task.exact(), {}
        for name, way in CURVES.items():
            for budget in way.budgets:
                runs = [way.measured(task, budget) for _ in range(1 + c.repetitions)]
                ms = statistics.median(passed for _, passed in runs[1:])
                error = max(error_of(runs[0][0], truth), 1e-14)
                rows[f"{name}, {budget:g}"] = {"ms": ms, "error": error}
        yield title, pd.DataFrame(rows).T


def draw(found: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel a problem, a curve a way."""
    panels = {
        title: {name: table.loc[[f"{name}, {budget:g}" for budget in way.budgets]]
                .set_index("ms")["error"] for name, way in CURVES.items()}
        for title, table in found.items()
    }  # fmt: skip
    return draw_panels(panels, lambda name: False, ylabel="relative error of the hypergradient",
                       xlabel="processor time of the backward pass, ms")  # fmt: skip


@ex.automain
@within_limits()
def differentiating(_run: Any) -> dict[str, float]:
    """Print the tables; returns every error or cosine."""
    c = DifferentiatingSettings.of(_run.config)
    points = Points(_run, c)
    made = {"systems": systems, "features": features, "network": network, "time": against_time}
    result: dict[str, float] = {}
    curves: dict[str, pd.DataFrame] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)  # it is what is measured
        for part in c.parts:
            for title, table in made[part](c):
                shown = table.map(number).to_markdown(disable_numparse=True)
                print(f"\n{title}\n\n{shown}", flush=True)
                for name, row in table.iterrows():
                    values = {f"{part}/{title}/{name}/{key}".replace(".", "_"): value
                              for key, value in row.items()}  # fmt: skip
                    points.record(values, 0)
                wrong = table["cosine" if part == "network" else "error"]
                result |= {f"{part}/{title}/{name}": value for name, value in wrong.items()}
                if part == "time":
                    curves[title] = table
    if curves:
        points.keep("differentiating", draw(curves))
    return result
