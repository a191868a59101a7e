"""However the inner problem and the linear system are solved, the hypergradient is one."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import implicit, minimize, relative_error
from problems import Problem, adapt, hypergradient, make_learner, problem
from small_task import SIX_LABELS as Y
from small_task import six_inputs as x
from torch import Tensor, nn

from l2l_implicit import ImplicitCGHead, ImplicitMAML
from l2l_implicit.inner_problem.linear_head import LinearHeadLinearization
from l2l_implicit.inner_problem.linearization import AutogradLinearization
from l2l_implicit.inner_problem.recognition import recognize
from l2l_implicit.inner_problem.regularizer import SquaredDistance
from l2l_implicit.inner_solvers.gradient_descent import GradientStep
from l2l_implicit.inner_solvers.newton import NewtonStep
from l2l_implicit.linear_solvers.direct_solve import direct_solve
from l2l_implicit.linear_solvers.solution import (
    CONVERGED,
)

pytestmark = pytest.mark.usefixtures("float64")

# Inner solver: its settings, and the steps after which it has converged.
INNER = {
    "newton": ({"step": "newton"}, 30),
    "gradient": ({"step": "gradient"}, 250),
    "gradient, lr=auto": ({"step": "gradient", "lr": "auto"}, 500),
    "lbfgs": ({"step": "lbfgs"}, 100),
    "one's own": ({"step": partial(NewtonStep, 0.1, 100, 1e-13)}, 30),
}
LINEAR = ["cg", "neumann", "direct"]
HEADS = ["softmax mean bias", "ridge mean", "two layers anchored"]
FEW_SAMPLES = 40  # features, with 12 samples: the head is reduced to the samples' span


def expected(task: Problem) -> list[Tensor]:
    phi = minimize(task.inner, task.start(), task.leaves(), task.lr)
    return implicit(task.inner, task.outer, task.leaves(), phi)


def wide(name: str) -> Problem:
    """A linear head with more features than samples."""
    task, weight = problem(name), torch.randn(4, FEW_SAMPLES)
    narrow = task.embed
    task.head = nn.Linear(FEW_SAMPLES, 3)
    task.embed = lambda theta: tuple(torch.sin(h @ weight) for h in narrow(theta))
    task.lr = 0.1
    return task


@pytest.mark.parametrize("solver", LINEAR)
@pytest.mark.parametrize("inner", list(INNER))
@pytest.mark.parametrize("name", HEADS)
def test_all_meet_at_one_hypergradient(name: str, inner: str, solver: str) -> None:
    task = problem(name)
    exact, (settings, steps) = expected(task), INNER[inner]
    task.lr = settings.get("lr", task.lr)
    more = {"step": settings["step"], "solver": solver, "cg_steps": 1000}
    learner, loss = adapt(make_learner(task, **more), task, "closure", steps)
    assert relative_error(hypergradient(task, loss), exact) < 1e-8
    assert learner.diagnostics.cg_reason == CONVERGED


@pytest.mark.parametrize("how", ["closure", "loss"])
@pytest.mark.parametrize("solver", LINEAR)
@pytest.mark.parametrize("step", ["newton", "lbfgs"])
@pytest.mark.parametrize("name", HEADS[:2])
def test_fewer_samples_than_features(name: str, step: str, solver: str, how: str) -> None:
    task = wide(name)
    parent = make_learner(task, step=step, solver=solver, cg_steps=3000)
    learner, loss = adapt(parent, task, how, 80)
    assert relative_error(hypergradient(task, loss), expected(task)) < 1e-8
    if solver == "direct":
        assert learner.diagnostics.cg_steps == 12 * 3, "not in the smaller dimension"


@pytest.mark.parametrize("loss_of", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [3, 50])
def test_closed_forms_equal_the_general_path(
    loss_of: object, reduction: str, bias: bool, width: int
) -> None:
    learner = ImplicitCGHead(nn.Linear(width, 3, bias), 0.1).clone()
    features = torch.tanh(torch.randn(12, width, requires_grad=True))
    targets = torch.randn(12, 3) if loss_of is F.mse_loss else torch.arange(12) % 3
    loss = loss_of(learner(features), targets, reduction=reduction)
    phi, quadratic = list(learner.module.parameters()), SquaredDistance(0.2, None)
    parts = recognize(loss, phi)
    assert parts is not None
    closed = LinearHeadLinearization(float(loss.detach()), parts, phi, quadratic)
    general = AutogradLinearization(loss, phi, quadratic=quadratic)
    assert relative_error([closed.gradient], [general.gradient]) < 1e-14
    v = torch.randn_like(closed.point)
    assert relative_error([closed.hvp(v)], [general.hvp(v)]) < 1e-14
    assert relative_error(closed.mixed_vjp(v), general.mixed_vjp(v)) < 1e-14
    value, gradient = closed.evaluate(closed.point)
    assert value == pytest.approx(general.objective, rel=1e-14)
    assert relative_error([gradient], [general.gradient]) < 1e-14
    hessian = torch.stack([general.hvp(e) for e in torch.eye(len(v))])
    dense = torch.linalg.solve(hessian, v)
    small = closed.solve(v, lambda matvec, b, start: direct_solve(matvec, b))
    assert relative_error([small.solution], [dense]) < 1e-11
    direction = closed.newton_direction()
    assert (direction is None) == (width == 3)
    if direction is not None:
        newton = -torch.linalg.solve(hessian, closed.gradient)
        assert relative_error([direction], [newton]) < 1e-11


@pytest.mark.parametrize("case", ["trained targets", "broadcast", "one column", "scaled", "huber"])
def test_other_squared_errors_go_the_general_way(case: str) -> None:
    learner = ImplicitCGHead(nn.Linear(4, 3), 0.1).clone()
    out, y = learner(x()), torch.randn(6, 3)
    loss = {
        "trained targets": lambda: F.mse_loss(out, y.requires_grad_()),
        "broadcast": lambda: F.mse_loss(out.unsqueeze(0).expand(2, 6, 3), torch.randn(2, 6, 3)),
        "one column": lambda: F.mse_loss(out[:, 0], y[:, 0]),
        "scaled": lambda: 0.5 * F.mse_loss(out, y),
        "huber": lambda: F.huber_loss(out, y),
    }[case]()
    assert recognize(loss, list(learner.module.parameters())) is None


# Nothing is taken from an adaptation before that is not the same


@pytest.mark.parametrize("change", ["features", "in place", "targets"])
@pytest.mark.parametrize("step, steps", [("newton", 12), ("lbfgs", 60)])
def test_data_that_change_after_convergence_are_seen(step: str, steps: int, change: str) -> None:
    parents = (ImplicitCGHead(nn.Linear(20, 3), 0.1, step=s) for s in (step, "newton"))
    learner, twin = (parent.clone() for parent in parents)
    twin.module.load_state_dict(learner.module.state_dict())
    h, y = torch.randn(6, 20, requires_grad=True) * 1.0, Y.clone()
    for _ in range(steps):
        learner.adapt(F.cross_entropy(learner(h), y))
    solved, task = learner.module.weight, learner._task
    learner.adapt(F.cross_entropy(learner(h), y))
    assert learner.module.weight is solved and task.solved
    if change == "targets":
        y.copy_(y.roll(1))
    elif change == "in place":
        h.data.mul_(2.0)
    else:
        h = (2.0 * h.detach()).requires_grad_()
    for _ in range(steps):
        learner.adapt(F.cross_entropy(learner(h), y))
    twin.adapt(lambda: F.cross_entropy(twin(h), y), steps=30)
    assert relative_error([learner.module.weight], [twin.module.weight]) < 1e-4
    assert relative_error([learner.module.weight], [solved]) > 1e-2


# The parts


def test_auto_lr_is_one_over_the_largest_curvature() -> None:
    a = torch.diag(torch.linspace(0.1, 7.0, 60))
    phi = torch.randn(60, requires_grad=True)
    at = AutogradLinearization(0.5 * phi @ a @ phi, [phi])
    step = GradientStep("auto")
    moved = step(at)
    assert 1 / step.lr == pytest.approx(7.0, rel=0.1) and 1 / step.lr > 0.97 * 7.0
    assert torch.equal(moved, at.point - step.lr * at.gradient)


def test_auto_lr_is_shortened_where_the_objective_rises() -> None:
    step, lrs, point = GradientStep("auto"), [], torch.tensor([0.1, 0.1])
    for _ in range(60):  # a curvature that grows with the distance
        phi = point.clone().requires_grad_()
        point = step(AutogradLinearization((phi - 3).square().square().sum() + phi.square().sum(),
                                           [phi]))
        lrs.append(step.lr)
    assert all(later <= before for before, later in zip(lrs, lrs[1:], strict=False))
    assert float(point.max() - point.min()) < 1e-6
    assert torch.isfinite(point).all()


@pytest.mark.parametrize("step, lr", [("gradient", 1.0), ("newton", 0.1), ("lbfgs", 0.1)])
def test_stop_tol(step: str, lr: float) -> None:
    for stop_tol in (1e-1, 1e-3):
        learner = ImplicitCGHead(nn.Linear(4, 3), lr, step=step, stop_tol=stop_tol).clone()
        inputs = x()
        learner.adapt(lambda: F.cross_entropy(learner(inputs), Y), steps=400)  # noqa: B023
        F.cross_entropy(learner(inputs), Y).backward()
        assert learner.diagnostics.inner_residual <= stop_tol
        assert learner.diagnostics.inner_steps < 200
    endless = ImplicitCGHead(nn.Linear(4, 3), 1.0, step="gradient").clone()
    endless.adapt(lambda: F.cross_entropy(endless(inputs), Y), steps=50)
    assert endless._task.steps == 50


def test_lbfgs_needs_a_loss_that_it_can_compute_again() -> None:
    deep = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    learner = ImplicitCGHead(deep, 0.1, step="lbfgs").clone()
    with pytest.raises(RuntimeError, match=r"expected a loss .* use adapt\(closure, steps=K\)"):
        learner.adapt(F.cross_entropy(learner(x()), Y))


@pytest.mark.parametrize("kind", ["factory", "object"])
def test_ones_own_step(kind: str) -> None:
    made: list[GradientStep] = []

    def factory() -> GradientStep:
        made.append(GradientStep(0.5))
        return made[-1]

    def once(at: AutogradLinearization) -> Tensor:
        return at.point - 0.5 * at.gradient

    parent = ImplicitCGHead(nn.Linear(4, 3), 0.1, step=factory if kind == "factory" else once)
    reference = ImplicitCGHead(parent.module, 0.5, step="gradient")
    inputs, weights = x(), []
    for learner in (parent.clone(), parent.clone(), reference.clone()):
        for _ in range(3):
            learner.adapt(F.cross_entropy(learner(inputs), Y))
        weights.append(learner.module.weight)
    assert torch.equal(weights[0], weights[2]) and torch.equal(weights[1], weights[2])
    assert len(made) == (2 if kind == "factory" else 0)


SETTINGS = [
    ({"step": lambda a, b: a}, TypeError, "functools.partial"),
    ({"solver": "cgg"}, ValueError, "did you mean 'cg'"),
    ({"solver": None}, ValueError, "'direct'"),
    ({"neumann_alpha": -1.0}, ValueError, "above 0"),
    ({"stop_tol": 0.0}, ValueError, "above 0"),
    ({"lr": "aut"}, TypeError, "'auto'"),
    ({"lr": "auto", "first_order": True}, ValueError, "first_order"),
]


@pytest.mark.parametrize("settings, kind, hint", SETTINGS)
def test_settings(settings: dict, kind: type[Exception], hint: str) -> None:
    with pytest.raises(kind, match=hint) as caught:
        ImplicitCGHead(nn.Linear(4, 3), **{"lr": 0.1, **settings})
    assert "\n" not in str(caught.value) and str(caught.value).startswith(next(iter(settings)))


def test_hessian_free_imaml_makes_progress_at_every_step() -> None:
    """A small CNN with ReLU and batch norm, whose Hessian is indefinite: five CG steps each."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip
    images, ends = torch.randn(9, 1, 14, 14), {}
    for name, lr in (("newton", 0.1), ("gradient", 0.1), ("gradient", 0.03)):
        learner, values = ImplicitMAML(module, lr, l2=0.5, step=name, cg_steps=5).clone(), []
        inner_step = learner.inner_step

        def watch(at: AutogradLinearization, step=inner_step, seen=values) -> Tensor:
            seen.append(at.objective)
            return step(at)

        learner.inner_step = watch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learner.adapt(
                lambda net=learner: F.cross_entropy(net(images), torch.arange(9) % 3), steps=12
            )
        ends[name, lr] = values[-1]
        if name == "newton":
            assert all(b < a for a, b in zip(values, values[1:], strict=False))
    assert ends["newton", 0.1] < min(ends["gradient", 0.1], ends["gradient", 0.03])
