"""Curvature and linear solves beside curvlinops and linear_operator, which share no code with us.

`tox -e references` has both.
"""

import pytest
import torch
from oracles import flat
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from l2l_implicit import (
    CG,
    GaussNewton,
    GradientDescent,
    Hessian,
    ImplicitCGHead,
    ImplicitMAML,
    Kronecker,
    Newton,
    Nystrom,
)

NEEDS = {"reason": "curvlinops and linear_operator are no requirements: tox -e references has them"}
curvlinops = pytest.importorskip("curvlinops", **NEEDS)
operators = pytest.importorskip("linear_operator.operators", **NEEDS)
utils = pytest.importorskip("linear_operator.utils", **NEEDS)

pytestmark = pytest.mark.usefixtures("float64")
L2 = 0.4


@pytest.fixture
def matrix() -> Tensor:
    torch.manual_seed(0)
    factor = torch.randn(12, 3)
    return factor @ factor.T


@pytest.mark.parametrize(("curvature", "operator"), [
    (Hessian(), "HessianLinearOperator"), (GaussNewton(), "GGNLinearOperator"),
])  # fmt: skip
def test_hypergradient_of_a_network_by_curvlinops(curvature: object, operator: str) -> None:
    """theta is the anchor: the hypergradient is l2 (H + l2 I)^-1 of the query loss's gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y, query = torch.randn(9, 4), torch.arange(9) % 3, torch.randn(9, 4)
    maml = ImplicitMAML(net, 0.1, l2=L2, inner=Newton(100, 1e-12), curvature=curvature,
                        linear=CG(300, 1e-13))  # fmt: skip
    learner = maml.clone()
    learner.adapt(lambda: cross_entropy(learner(x), y), steps=100)
    cross_entropy(learner(query), y.roll(1)).backward()

    twin = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    nn.utils.vector_to_parameters(flat(learner.module.parameters()).detach(), twin.parameters())
    found = getattr(curvlinops, operator)(
        twin, nn.CrossEntropyLoss(), list(twin.parameters()), [(x, y)]
    )
    dense = found @ torch.eye(found.shape[1])
    b = flat(torch.autograd.grad(cross_entropy(twin(query), y.roll(1)), list(twin.parameters())))
    right = L2 * torch.linalg.solve(dense + L2 * torch.eye(len(b)), b)
    torch.testing.assert_close(flat(p.grad for p in net.parameters()), right, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("solve", [None, Kronecker()], ids=["exact", "preconditioned"])
def test_a_ridge_head_is_a_kronecker_product(solve: Kronecker | None) -> None:
    """Its Hessian is X^T X x 2 s I + l2 I, whose inverse linear_operator has."""
    torch.manual_seed(0)
    head = nn.Linear(8, 3, bias=False)
    x, y, query = torch.randn(20, 8), torch.randn(20, 3), torch.randn(5, 8)
    inner = Newton() if solve is None else GradientDescent()
    linear = CG() if solve is None else CG(40, 1e-13, preconditioner=solve)
    parent = ImplicitCGHead(head, 0.1, l2=L2, anchor="init", inner=inner, linear=linear)
    learner = parent.clone()
    learner.adapt(lambda: mse_loss(learner(x), y), steps=2000)
    learner(query).square().sum().backward()

    phi = learner.module.weight.detach().clone().requires_grad_()
    (b,) = torch.autograd.grad((query @ phi.T).square().sum(), phi)
    product = operators.KroneckerProductLinearOperator(
        operators.DenseLinearOperator(2 / 60 * torch.eye(3)),
        operators.DenseLinearOperator(x.T @ x),
    )
    v = product.add_diagonal(torch.tensor(L2)).solve(b.reshape(-1, 1))
    torch.testing.assert_close(head.weight.grad.reshape(-1, 1), L2 * v, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:CG terminated")
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_conjugate_gradient_step_by_step(steps: int, matrix: Tensor) -> None:
    """Subroutine 1 after N steps is linear_operator's after N."""
    system, b = matrix + torch.diag(torch.linspace(0.5, 2, 12)), torch.randn(12, 1)
    theirs = utils.linear_cg(system.matmul, b, max_iter=steps, max_tridiag_iter=0, tolerance=0)
    ours = CG(steps, 1e-12).solve(lambda p: p @ system, b.T)
    torch.testing.assert_close(ours.solution, theirs.T, rtol=1e-10, atol=1e-12)


def test_nystrom_by_woodbury(matrix: Tensor) -> None:
    """A sketch of full rank is the matrix: linear_operator inverts its root and the damping."""
    b = torch.randn(12, 1)
    values, basis = torch.linalg.eigh(matrix)
    root = basis[:, -3:] * values[-3:].sqrt()
    low = operators.LowRankRootLinearOperator(root).add_diagonal(torch.tensor(0.1))
    found = Nystrom(3, damping=0.1).solve(lambda p: p @ matrix + 0.1 * p, b.T)
    torch.testing.assert_close(found.solution, low.solve(b).T, rtol=1e-8, atol=1e-10)
