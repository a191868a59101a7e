"""learn2learn's ANIL example, unchanged but for the line that builds the head."""

from collections.abc import Callable

import pytest
import torch
from small_task import adapt
from torch import Tensor, nn

from l2l_implicit import GradientDescent, ImplicitCGHead, ImplicitMAML
from l2l_implicit.tasks import split_support_query

import learn2learn as l2l  # isort: skip  (after l2l_implicit, which repairs it)

WAYS, SHOTS, TASKS, FEATURES = 3, 2, 2, 32
HEADS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "MAML": lambda head: l2l.algorithms.MAML(head, lr=0.1),
    "ImplicitCGHead": lambda head: ImplicitCGHead(head, lr=0.1),
    "gradient": lambda head: ImplicitCGHead(head, lr=0.1, inner=GradientDescent(), l2=0.3),
    "anchored": lambda head: ImplicitCGHead(head, lr=0.1, anchor="init"),
    "first order": lambda head: ImplicitCGHead(head, lr=0.1, first_order=True),
    "ImplicitMAML": lambda head: ImplicitMAML(head, lr=0.1),
}


def sample(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images of classes told apart by a pattern."""
    patterns = torch.randn(WAYS, 3, 16, 16, generator=generator)
    labels = torch.arange(WAYS).repeat_interleave(2 * SHOTS)
    noise = torch.randn(len(labels), 3, 16, 16, generator=generator)
    return patterns[labels] + 1.5 * noise, labels


def train(name: str, iterations: int) -> tuple[list[float], nn.Module]:
    """The mean query loss at each outer iteration."""
    torch.manual_seed(0)
    base = l2l.vision.models.ConvBase(hidden=FEATURES, channels=3, max_pool=True)
    features, head = nn.Sequential(base, nn.Flatten()), HEADS[name](nn.Linear(FEATURES, WAYS))
    all_parameters = list(features.parameters()) + list(head.parameters())
    optimizer = torch.optim.Adam(all_parameters, lr=0.003)
    loss, generator, errors = nn.CrossEntropyLoss(reduction="mean"), torch.Generator(), []

    def query_loss() -> Tensor:
        learner, (data, labels) = head.clone(), sample(generator)
        (x, y), (x_query, y_query) = split_support_query(features(data), labels, SHOTS)
        adapt(learner, lambda: loss(learner(x), y), "loss", 5)
        return loss(learner(x_query), y_query)

    for _ in range(iterations):
        generator.manual_seed(0)
        optimizer.zero_grad()
        total = 0.0
        for _ in range(TASKS):
            error = query_loss()
            error.backward()
            total += error.item()
            query_loss()  # a validation task, whose graph nobody uses
        for p in all_parameters:
            p.grad.data.mul_(1.0 / TASKS)
        optimizer.step()
        errors.append(total / TASKS)
    return errors, head


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
def test_the_examples_loop_learns(name: str) -> None:
    """Anchored to zero the head's initial value has gradient zero: Adam leaves it where it is."""
    (errors, head), (again, untrained) = (train(name, iterations) for iterations in (12, 1))
    assert sum(errors[-3:]) < 0.7 * sum(errors[:3]) and errors[:1] == again
    stays = torch.equal(head.module.weight, untrained.module.weight)
    assert stays == (name in ("ImplicitCGHead", "gradient"))
