"""The exact hypergradients of the experiment, and that its learners approach them."""

from collections.abc import Callable

import oracles
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.papers.hypergradient import Classification, Method, Problem, Regression

pytestmark = pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")


def regression() -> Regression:
    return Regression(4, 100.0, 0.05, 0)


def classification() -> Classification:
    return Classification(3, 4, 5, 0.05, 0)


def error(task: Problem, method: Method, steps: int) -> float:
    return oracles.relative_error([task.estimate(method, steps)], [task.exact()])


def objectives(task: Classification) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The inner and the outer one of phi and the layer."""

    def loss(phi: Tensor, layer: Tensor, inputs: Tensor) -> Tensor:
        return cross_entropy(torch.tanh(inputs @ layer) @ phi.view(3, 5).T, task.targets[0])

    def inner(phi: Tensor, layer: Tensor) -> Tensor:
        return loss(phi, layer, task.inputs[0]) + 0.5 * task.l2 * phi.square().sum()

    return inner, lambda phi, layer: loss(phi, layer, task.inputs[1])


def test_the_exact_hypergradients() -> None:
    task, head = regression(), classification()

    def inner(phi: Tensor, theta: Tensor) -> Tensor:
        residual = task.inputs[0] @ phi - task.targets[0]
        return 0.5 * residual.square().mean() + 0.5 * task.l2 * (phi - theta).square().sum()

    def outer(phi: Tensor, theta: Tensor) -> Tensor:
        return 0.5 * (task.inputs[1] @ phi - task.targets[1]).square().mean()

    cases = ((task, (inner, outer), task.theta, 4),
             (head, objectives(head), head.theta.detach(), 15))  # fmt: skip
    for problem, both, theta, size in cases:
        start = torch.zeros(size, dtype=torch.float64)
        phi = oracles.minimize(both[0], start, [theta], problem.lr)
        expected = [t.reshape(-1) for t in oracles.implicit(*both, [theta], phi)]
        assert oracles.relative_error([problem.exact()], expected) < 1e-10


def test_the_regression_is_as_ill_conditioned_as_it_says() -> None:
    task = Regression(6, 1000.0, 0.01, 3)
    values = torch.linalg.eigvalsh(task.inputs[0].T @ task.inputs[0] / len(task.inputs[0])) + 0.01
    assert float(values.max()) == pytest.approx(1.01)
    assert task.lr == pytest.approx(1 / 1.01)
    assert task.condition == pytest.approx(float(values.max() / values.min()), rel=1e-6)


@pytest.mark.parametrize("make", [regression, classification])
def test_both_ways_end_at_the_exact_hypergradient(make: type[Problem]) -> None:
    task = make()
    assert error(task, Method(30), 800) < 1e-9
    assert error(task, Method(None, penalty=True), 800) < 1e-9
    assert error(task, Method(None), 800) > 0.1  # without the regulariser: another problem


def test_unrolling_is_back_propagation() -> None:
    """ITD-BiO on the head after seven steps, against a loop by hand."""
    task = classification()
    inner, outer = objectives(task)
    start = task.module.weight.detach().reshape(-1)
    (expected,) = oracles.unrolled(inner, outer, [task.theta], start, task.lr, 7)
    found = task.estimate(Method(None, True), 7)
    assert oracles.relative_error([found], [expected.reshape(-1)]) < 1e-12


def test_imaml_after_k_steps_by_hand() -> None:
    """l2 H^-1 times the query loss's gradient at phi^K."""
    task = regression()
    (support, query), (targets, query_targets) = task.inputs, task.targets
    curvature = support.T @ support / len(support) + task.l2 * torch.eye(4, dtype=torch.float64)
    right, phi = support.T @ targets / len(support) + task.l2 * task.theta, task.theta
    for _ in range(9):
        phi = phi - task.lr * (curvature @ phi - right)
    slope = query.T @ (query @ phi - query_targets) / len(query)
    expected = task.l2 * torch.linalg.solve(curvature, slope)
    found = task.estimate(Method(8), 9)
    assert oracles.relative_error([found], [expected]) < 1e-10
