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

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

import copy
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian
from torch.nn.functional import cross_entropy

from experiments.ingredients.model import ModelSettings, build_backbone, use_threads, within_limits
from experiments.ingredients.tasks import make_tasks
from experiments.papers.hypergradient import Classification
from experiments.tracking import TrackedExperiment, UserError, record
from experiments.tracking.config import Count, Positive, RunSettings, Seed, Text, Threads
from experiments.training.outcome import folder_of
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
Table = dict[str, dict[str, float]]


class DifferentiatingSettings(RunSettings):
    """The settings of this experiment."""

    parts: list[Literal[PARTS]] = ["systems", "network", "time"]
    repetitions: Count = 3  # of what is timed: medians of processor time
    # systems
    width: Count = 16384  # features of a few-shot head
    samples: Count = 125  # of it, in five classes
    conditions: Annotated[list[Positive], Field(strict=False)] = [1e4, 1e6, 1e8]
    most: Count = 3000  # steps of conjugate gradient
    # features: what runs of experiments.train left, in this order
    parameters: list[str] = []
    root: Text = "data"  # folder of the data sets
    tasks: Count = 5  # of either data set
    # network
    filters: Count = 8  # a layer
    threads: Threads = 1  # of torch; 0 leaves torch's own choice
    seed: Seed = 0  # of data, tasks and initial values
    output: Text = "runs"  # the folder of the picture


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


def show(title: str, rows: Table) -> str:
    """A table as Markdown."""
    columns = list(next(iter(rows.values())))
    lines = [f"\n{title}\n", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(map(number, row.values())) + " |")
    return "\n".join(lines)


def number(value: float) -> str:
    if value >= 1e5:
        return "above 1e5"
    return f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.2g}"


# Preconditioners.

L2 = 1e-6
SOLVERS: dict[str, Callable[[int], LinearSolver]] = {
    "CG": lambda most: CG(most),
    "Jacobi": lambda most: CG(most, preconditioner=Jacobi()),
    "Nystrom(50)": lambda most: CG(most, preconditioner=Nystrom(50)),
    "Kronecker": lambda most: CG(most, preconditioner=Kronecker()),
}


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


def systems(c: DifferentiatingSettings) -> Iterator[tuple[str, Table]]:
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
            truth, table = exactly(at, b), Table()
            for name, make in SOLVERS.items():
                def run(make: Any = make) -> Any:
                    return make(c.most).solve(System(at.hvp, 0.0, at, 1e-2), b)  # noqa: B023

                ms, answer = timed(c.repetitions, run)
                error = error_of(answer.solution, truth)
                table[name] = {"products": float(answer.steps), "ms": ms, "error": error}
            real = 1.0 + float(largest_curvature(at.hvp, b, 30)) / L2
            yield f"{title}, L / l2 = {condition:.0e} at zero, {real:.1e} here", table


# Accuracy instead of steps.

INNER: dict[str, InnerSolver] = {
    "gradient": GradientDescent(adaptive=True), "L-BFGS": LBFGS(), "Newton": Newton(),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "20, 20": {}, **{f"{a:g}": {"accuracy": a} for a in (1e-1, 1e-2, 1e-3)}
}  # fmt: skip


def features(c: DifferentiatingSettings) -> Iterator[tuple[str, Table]]:
    """K, N, time and true error on CIFAR-FS, 5-way 5-shot, for the features of each file."""
    given = make_tasks(name="cifarfs", root=c.root)
    torch.manual_seed(c.seed)  # of the initial heads
    for path in c.parameters:
        if not Path(path).is_file():
            raise UserError(f"parameters: expected a file that a run left, got {path!r}; train one")
        state = torch.load(path, weights_only=True)["backbone"]
        settings = ModelSettings(name="cnn4", hidden=len(state["0.conv.bias"]))
        backbone, width = build_backbone(given.input_shape(), settings)
        backbone.load_state_dict(state)
        stream, found = given.stream("test", c.seed), {}
        for _ in range(c.tasks):
            episode = stream.sample()
            with torch.no_grad():
                h = backbone(episode.inputs)
            one_task(h, episode.support_targets, episode.query_targets, c.repetitions, found)
        size = float(h.norm(dim=1).mean())
        table = {name: {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
                 for name, rows in found.items()}  # fmt: skip
        yield f"features of {path}, of length {size:.1f}", table


def one_task(
    h: Tensor, y: Tensor, query_y: Tensor, repetitions: int, found: dict[str, list[Any]]
) -> None:
    """Adds a row for each way to solve the inner problem of one task's head."""
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
            leaf = h.clone().requires_grad_()
            ms, (got, said) = timed(repetitions, lambda: hypergradient(
                leaf, steps, inner=solver, linear=linear, **settings))  # noqa: B023  # fmt: skip
            error = error_of(got.double(), truth)
            row = {"K": said.inner_steps, "N": said.cg_steps, "ms": ms, "error": error,
                   "said": said.hypergradient_error}  # fmt: skip
            found.setdefault(f"{inner}, {name}", []).append(row)


# The system of a whole network, away from its minimum.


def network(c: DifferentiatingSettings) -> Iterator[tuple[str, Table]]:
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
    stream, found = given.stream("train", c.seed), {name: list[Any]() for name in ways}
    for _ in range(c.tasks):
        episode = stream.sample()
        x, m = episode.inputs.double(), len(episode.support_targets)

        def gradient(learner: Any, penalty: float, x: Tensor = x, m: int = m) -> Tensor:
            clone, theta = learner.clone(), list(learner.module.parameters())

            def inner() -> Tensor:
                pairs = zip(clone.module.parameters(), theta, strict=True)
                far = sum(((p - t).square().sum() for p, t in pairs), torch.zeros(()))
                fit = cross_entropy(clone(x[:m]), episode.support_targets)  # noqa: B023
                return fit + 0.5 * penalty * far if penalty else fit

            clone.adapt(inner, steps=16)
            outer = cross_entropy(clone(x[m:]), episode.query_targets)  # noqa: B023
            return torch.cat([g.flatten() for g in torch.autograd.grad(outer, theta)])

        truth = gradient(UnrolledMAML(copy.deepcopy(net), lr), l2)
        for name, linear in ways.items():
            settings = {"l2": l2, "linear": linear, "curvature": Hessian()}
            learner = ImplicitMAML(copy.deepcopy(net), lr, **settings)
            got = gradient(learner, 0.0)
            size, cosine = float(got.norm() / truth.norm()), torch.cosine_similarity(got, truth, 0)
            found[name].append((float(cosine), size, learner.diagnostics.cg_steps))
    table: Table = {}
    for name, rows in found.items():
        cosines, sizes, products = zip(*rows, strict=True)
        table[name] = {"cosine": statistics.median(cosines), "least": min(cosines),
                       "size": statistics.median(sizes), "largest": max(sizes),
                       "products": statistics.mean(products)}  # fmt: skip
    yield f"a CNN4 with {c.filters} filters, 16 steps from theta", table


# Error against time.


class Way(NamedTuple):
    """A way to differentiate, with the budgets that its curve runs through.

    Attributes:
        budgets: steps, ranks or accuracies.
        learner: from a problem and a budget.
        steps: K by the budget, of a way that unrolls them; None: an inner solver that ends.
    """

    budgets: Sequence[float]
    learner: Callable[[Any, Any], Any]
    steps: Callable[[Any], int] | None = None


def implicit(make: Callable[[Any, Any], LinearSolver]) -> Callable[[Any, Any], Any]:
    """The learner with an inner problem that is solved, by L-BFGS, which leaves no factor."""
    return lambda task, budget: task.kind(
        copy.deepcopy(task.module), task.lr, l2=task.l2, inner=LBFGS(tol=1e-10),
        linear=make(task, budget), curvature=Hessian(), max_error=1e300,
    )  # fmt: skip


NUMBERS = (1, 2, 3, 5, 8, 12, 20, 30, 50, 80)
MANY = (1, 3, 10, 30, 100, 300)
CURVES: dict[str, Way] = {
    "conjugate gradient": Way(NUMBERS, implicit(lambda task, n: CG(n, 1e-14))),
    "preconditioned": Way(
        NUMBERS, implicit(lambda task, n: CG(n, 1e-14, preconditioner=task.preconditioner))
    ),
    "Nystrom": Way(NUMBERS, implicit(lambda task, n: Nystrom(n))),
    "one step": Way((1,), implicit(lambda task, n: Identity(task.lr))),
    "Neumann": Way(MANY, implicit(lambda task, n: Neumann(n, 1e-14))),
    "unrolled": Way(
        MANY,
        lambda task, k: UnrolledMAML(
            copy.deepcopy(task.module), task.lr, learn_init=task.kind is ImplicitMAML
        ),
        steps=int,
    ),
    "accuracy": Way(
        (0.3, 1e-1, 1e-2, 1e-3, 1e-4),
        lambda task, a: task.kind(
            copy.deepcopy(task.module), task.lr, l2=task.l2, inner=LBFGS(), linear=CG(500),
            curvature=Hessian(), accuracy=a, max_error=1e300,
        ),
    ),
    "perturbed": Way(NUMBERS[2:], implicit(lambda task, n: Perturbed(steps=n, tol=1e-14))),
}  # fmt: skip


class Head(Classification):
    """A logistic head on the features of a layer; the hypergradient is that of the layer."""

    preconditioner: Any = Kronecker()

    def theta(self, learner: Any) -> list[Tensor]:
        return [self.layer]

    def features(self) -> list[Tensor]:
        return [torch.tanh(x @ self.layer) for x in self.inputs]

    def measured(self, way: Way, budget: Any) -> tuple[Tensor, float]:
        """The hypergradient, and the milliseconds that ``backward()`` took, with all K steps of a
        way that unrolls."""
        learner = way.learner(self, budget)
        theta, clone, (support, query) = self.theta(learner), learner.clone(), self.features()

        def inner() -> Tensor:
            loss = cross_entropy(clone(support), self.labels)
            if way.steps:
                anchor = theta if self.kind is ImplicitMAML else [torch.zeros(())]
                pairs = zip(clone.module.parameters(), anchor, strict=True)
                far = [(phi - a).square().sum() for phi, a in pairs]
                loss = loss + 0.5 * self.l2 * torch.stack(far).sum()
            return loss

        begin = time.process_time()
        clone.adapt(inner, steps=way.steps(budget) if way.steps else 500)
        loss = cross_entropy(clone(query), self.labels)
        if not way.steps:
            begin = time.process_time()
        gradients = torch.autograd.grad(loss, theta)
        passed = 1e3 * (time.process_time() - begin)
        return torch.cat([g.flatten() for g in gradients]), passed


class Network(Head):
    """Two layers, all of it adapted and anchored at the initial value, which is theta."""

    kind: Any = ImplicitMAML
    preconditioner: Any = Jacobi()

    def __init__(self, seed: int) -> None:
        super().__init__(5, 5, 16, 0.1, seed)
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        self.inputs = [torch.tanh(x @ self.layer.detach()) for x in self.inputs]
        self.lr = 0.5

    def theta(self, learner: Any) -> list[Tensor]:
        return list(learner.module.parameters())

    def features(self) -> list[Tensor]:
        return self.inputs

    def _at(self, phi: Tensor, x: Tensor) -> Tensor:
        named = dict(self.module.named_parameters())
        pieces = phi.split([p.numel() for p in named.values()])
        values = {k: v.view_as(p) for (k, p), v in zip(named.items(), pieces, strict=True)}
        return functional_call(self.module, values, (x,))

    def exact(self) -> Tensor:
        """``l2 H^-1 b`` by a dense Hessian, at the minimum that gradient descent leads to."""
        theta = torch.cat([p.detach().flatten() for p in self.module.parameters()])

        def inner(phi: Tensor) -> Tensor:
            fit = cross_entropy(self._at(phi, self.inputs[0]), self.labels)
            return fit + 0.5 * self.l2 * (phi - theta).square().sum()

        phi = theta
        for _ in range(500):
            phi = phi - self.lr * grad(inner)(phi)
        for _ in range(10):
            phi = phi - torch.linalg.solve(hessian(inner)(phi), grad(inner)(phi))
        b = grad(lambda p: cross_entropy(self._at(p, self.inputs[1]), self.labels))(phi)
        return self.l2 * torch.linalg.solve(hessian(inner)(phi), b)


def against_time(c: DifferentiatingSettings) -> Iterator[tuple[str, Table]]:
    """Processor time of the backward pass, and the error, for each budget of each way."""
    problems = {"head": Head(5, 10, 64, 1e-3, c.seed), "network": Network(c.seed)}
    for title, task in problems.items():
        truth, table = task.exact(), Table()
        for name, way in CURVES.items():
            for budget in way.budgets:
                runs = [task.measured(way, budget) for _ in range(1 + c.repetitions)]
                ms = statistics.median(passed for _, passed in runs[1:])
                error = max(error_of(runs[0][0], truth), 1e-14)
                table[f"{name}, {budget:g}"] = {"ms": ms, "error": error}
        yield title, table


def draw(found: dict[str, Table]) -> Figure:
    """A panel a problem, a curve a way."""
    drawing = Figure(figsize=(11.0, 4.8), layout="constrained")
    panels = drawing.subplots(1, len(found), squeeze=False)[0]
    for axes, (title, table) in zip(panels, found.items(), strict=True):
        for name in CURVES:
            rows = [row for key, row in table.items() if key.rpartition(",")[0] == name]
            axes.loglog([r["ms"] for r in rows], [r["error"] for r in rows], "o-", label=name,
                        markersize=4)  # fmt: skip
        axes.set(xlabel="processor time of the backward pass, ms", title=title,
                 ylabel="relative error of the hypergradient")  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return drawing


@ex.automain
@within_limits()
def differentiating(_run: Any, output: str) -> dict[str, float]:
    """Print the tables; returns every error or cosine."""
    c = DifferentiatingSettings.of(_run.config)
    use_threads(c.threads)
    made = {"systems": systems, "features": features, "network": network, "time": against_time}
    result: dict[str, float] = {}
    curves: dict[str, Table] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsolvedWarning)  # it is what is measured
        for part in c.parts:
            for title, table in made[part](c):
                print(show(title, table), flush=True)
                for name, row in table.items():
                    for key, value in row.items():
                        metric = f"{part}/{title}/{name}/{key}".replace(".", "_")
                        record(_run, {metric: value}, 0)
                    key = "cosine" if part == "network" else "error"
                    result[f"{part}/{title}/{name}"] = row[key]
                if part == "time":
                    curves[title] = table
    if curves:
        picture = folder_of(_run, output) / "differentiating.png"
        draw(curves).savefig(picture, dpi=120)
        _run.add_artifact(picture)
        print(f"\npicture: {picture}")
    return result
