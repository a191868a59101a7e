"""From settings to backbones and to the library's solvers."""

from typing import Any

import pytest
import torch

from experiments.ingredients.algorithm import _linear
from experiments.ingredients.algorithm_table import AlgorithmSettings
from experiments.ingredients.model import ModelSettings, build_backbone, l2l, within_limits
from experiments.tracking import UserError
from l2l_implicit import CG, Direct, Identity, Jacobi, Kronecker, Neumann, Nystrom


@pytest.mark.parametrize(("last_pool", "width"), [(True, 8 * 2 * 2), (False, 8 * 4 * 4)])
def test_without_the_last_pool_there_are_four_times_as_many_features(
    last_pool: bool, width: int
) -> None:
    images, found = torch.randn(6, 3, 32, 32), []
    for pool in (True, last_pool):
        torch.manual_seed(0)
        settings = ModelSettings.of({"hidden": 8, "last_pool": pool})
        network, number = build_backbone(images.shape[1:], settings)
        found.append(network(images))
    assert number == found[1].shape[1] == width
    # pooled, they are those of the whole network
    sides = found[1].unflatten(1, (8, -1)).unflatten(2, (4 if not last_pool else 2, -1))
    pooled = sides if last_pool else torch.nn.functional.max_pool2d(sides, 2)
    torch.testing.assert_close(pooled.flatten(1), found[0])


def test_low_precision_is_of_the_products_alone() -> None:
    images, kinds = torch.randn(20, 3, 32, 32), ("float32", "bfloat16")
    features, gradients = [], []
    for precision in kinds:
        torch.manual_seed(0)
        settings = ModelSettings.of({"hidden": 8, "precision": precision})
        network, _ = build_backbone(images.shape[1:], settings)
        features.append(network(images))
        features[-1].pow(2).mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
        assert {p.dtype for p in network.parameters()} == {torch.float32}
    (exact, low), (there, here) = features, gradients
    assert low.dtype == here.dtype == torch.float32
    # eight bits a number, four layers, each normalised: some per cent, and not none
    assert 1e-4 < (low - exact).norm() / exact.norm() < 0.05
    assert 1e-4 < (here - there).norm() / there.norm() < 0.2


def test_omniglot_cnn_is_learn2learns_without_its_head() -> None:
    backbone, width = build_backbone((1, 28, 28), ModelSettings.of({"name": "omniglot_cnn"}))
    theirs = l2l.vision.models.OmniglotCNN(5)
    theirs.base.load_state_dict(backbone[0].state_dict())
    images = torch.rand(6, 1, 28, 28)
    assert width == theirs.classifier.in_features == 64
    torch.testing.assert_close(backbone(images), theirs.features(images))


def test_a_number_that_no_float32_holds_is_one_line() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with pytest.raises(UserError, match="^numbers: expected finite ones, got .* overflow; choose"):
        with within_limits():
            torch.optim.Adam([weight], lr=1e300).step()


LINEAR: list[tuple[dict[str, Any], Any]] = [
    ({"cg_steps": 7, "preconditioner": "kronecker"}, CG(7, preconditioner=Kronecker())),
    ({"preconditioner": "jacobi", "damping": 0.5}, CG(damping=0.5, preconditioner=Jacobi())),
    ({"preconditioner": "nystrom", "cg_tol": 1e-3}, CG(tol=1e-3, preconditioner=Nystrom())),
    ({"truncated": True}, CG(truncated=True)),
    ({"solver": "nystrom", "cg_steps": 5, "damping": 0.5}, Nystrom(5, 0.5)),
    ({"solver": "identity", "lr": 0.3}, Identity(0.3)),
    ({"solver": "neumann", "cg_steps": 9}, Neumann(9)),
    ({"solver": "direct", "damping": 0.5}, Direct(0.5)),
]


@pytest.mark.parametrize("settings, expected", LINEAR, ids=[str(s) for s, _ in LINEAR])
def test_the_linear_solver_is_the_one_that_is_set(settings: dict[str, Any], expected: Any) -> None:
    assert _linear(AlgorithmSettings.of(settings)) == expected
