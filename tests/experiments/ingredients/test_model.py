"""The backbone's settings: how many features it gives, and in which precision."""

import pytest
import torch

from experiments.ingredients.model import ModelSettings, build_backbone, l2l, within_limits
from experiments.tracking import UserError


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
