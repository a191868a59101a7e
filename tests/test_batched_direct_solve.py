"""The direct solver of the batched head in single precision, where rounding makes itself felt."""

import pytest
import torch
from torch import Tensor

from l2l_implicit.batched.linear_solve import GramFactor
from l2l_implicit.batched.losses import CrossEntropy
from l2l_implicit.batched.objective import BatchedLinearization, LinearObjective

TASKS, SAMPLES, CLASSES, WIDTH = 3, 25, 5, 200
UNKNOWNS = CLASSES * (WIDTH + 1)


@pytest.mark.parametrize("l2", [1e-1, 1e-2, 1e-3])
def test_the_refinement_takes_half_of_the_residual_at_least(l2: float) -> None:
    """Without it the residual is eps times the matrix's norm over l2, in the directions of data."""
    torch.manual_seed(0)
    features = torch.randn(TASKS, SAMPLES, WIDTH)
    targets = torch.eye(CLASSES).repeat(SAMPLES // CLASSES, 1).expand(TASKS, -1, -1)
    loss = CrossEntropy(targets, mean=True)
    objective = LinearObjective(features, loss, torch.tensor(l2), anchor=None, bias=True)
    phi = 0.01 * torch.randn(TASKS, UNKNOWNS)
    at = BatchedLinearization(objective, phi, objective.logits(phi))
    factor, b = GramFactor(at, objective.gram()), torch.randn(TASKS, UNKNOWNS)

    def relative_residual(v: Tensor) -> Tensor:
        return (b - at.hvp(v)).norm(dim=1) / b.norm(dim=1)

    answer = factor.solve(b, tol=1e-4)
    assert (answer.relative_residual < 0.5 * relative_residual(factor.solve_once(b))).all()
    assert torch.allclose(answer.relative_residual, relative_residual(answer.solution), rtol=1e-3)
