"""learn2learn's ANIL example, unchanged but for the line that builds the head."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from l2l_implicit import GradientDescent, ImplicitCGHead, ImplicitMAML

import learn2learn as l2l  # isort: skip  (after l2l_implicit, which repairs it)

WAYS, SHOTS, TASKS, FEATURES = 3, 2, 2, 32

HEADS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "MAML": lambda head: l2l.algorithms.MAML(head, lr=0.1),
    "FOMAML": lambda head: l2l.algorithms.MAML(head, lr=0.1, first_order=True),
    "ImplicitCGHead": lambda head: ImplicitCGHead(head, lr=0.1),
    "ImplicitCGHead gradient": lambda head: ImplicitCGHead(
        head, lr=0.1, inner=GradientDescent(), l2=0.3
    ),
    "ImplicitCGHead anchored": lambda head: ImplicitCGHead(head, lr=0.1, anchor="init"),
    "ImplicitCGHead first order": lambda head: ImplicitCGHead(head, lr=0.1, first_order=True),
    "ImplicitMAML": lambda head: ImplicitMAML(head, lr=0.1),
}


def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images of classes told apart by a pattern, in the order that the example expects."""
    patterns = torch.randn(WAYS, 3, 16, 16, generator=generator)
    labels = torch.arange(WAYS).repeat_interleave(2 * SHOTS)
    noise = torch.randn(len(labels), 3, 16, 16, generator=generator)
    return patterns[labels] + 1.5 * noise, labels


def fast_adapt(
    batch: tuple[Tensor, Tensor],
    learner: nn.Module,
    features: nn.Module,
    loss: nn.Module,
    adaptation_steps: int,
) -> tuple[Tensor, Tensor]:
    data, labels = batch
    data = features(data)
    indices = np.zeros(data.size(0), dtype=bool)
    indices[np.arange(SHOTS * WAYS) * 2] = True
    adaptation, evaluation = torch.from_numpy(indices), torch.from_numpy(~indices)
    for _ in range(adaptation_steps):
        learner.adapt(loss(learner(data[adaptation]), labels[adaptation]))
    predictions = learner(data[evaluation])
    accuracy = (predictions.argmax(dim=1) == labels[evaluation]).float().mean()
    return loss(predictions, labels[evaluation]), accuracy


def train(name: str, iterations: int) -> tuple[list[float], nn.Module, nn.Module]:
    """The mean query loss at each outer iteration."""
    torch.manual_seed(0)
    features = nn.Sequential(
        l2l.vision.models.ConvBase(hidden=FEATURES, channels=3, max_pool=True),
        nn.Flatten(),
    )
    head = HEADS[name](nn.Linear(FEATURES, WAYS))
    all_parameters = list(features.parameters()) + list(head.parameters())
    optimizer = torch.optim.Adam(all_parameters, lr=0.003)
    loss, generator, errors = nn.CrossEntropyLoss(reduction="mean"), torch.Generator(), []
    for _ in range(iterations):
        generator.manual_seed(0)
        optimizer.zero_grad()
        total = 0.0
        for _ in range(TASKS):
            learner = head.clone()
            error, _ = fast_adapt(sample(generator), learner, features, loss, 5)
            error.backward()
            total += error.item()
            learner = head.clone()  # a validation task, whose graph nobody uses
            fast_adapt(sample(generator), learner, features, loss, 5)
        for p in all_parameters:
            p.grad.data.mul_(1.0 / TASKS)
        optimizer.step()
        errors.append(total / TASKS)
    return errors, features, head


@pytest.mark.parametrize("name", list(HEADS))
@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_the_examples_loop_learns(name: str) -> None:
    errors, features, head = train(name, 15)
    assert sum(errors[-3:]) < 0.7 * sum(errors[:3])
    assert all(torch.isfinite(p).all() for p in [*features.parameters(), *head.parameters()])


def test_the_heads_initial_value_gets_no_push() -> None:
    """Anchored to zero the head's initial value has gradient zero: Adam leaves it where it is."""
    torch.manual_seed(0)
    _, _, head = train("ImplicitCGHead", 2)
    torch.manual_seed(0)
    nn.Sequential(l2l.vision.models.ConvBase(hidden=FEATURES, channels=3, max_pool=True))
    assert torch.equal(head.module.weight, nn.Linear(FEATURES, WAYS).weight)


def test_the_loop_is_deterministic() -> None:
    first, second = (train("ImplicitCGHead", 2)[0] for _ in range(2))
    assert first == second
