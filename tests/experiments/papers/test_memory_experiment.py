"""Peak memory against inner steps: what grows, what does not, and what is left out."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments.papers import memory
from experiments.papers.memory import RAJESWARAN, YANG, Shape, build, episode

SMALL = Shape(ways=3, shots=2, queries=2, channels=3, pixels=16, hidden=8)
CPU = torch.device("cpu")
METHODS = {**YANG, **RAJESWARAN}
pytestmark = pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")


def peaks(name: str, *steps: int, limit: float = 2.0**40,
          tick: Callable[[int], object] = id) -> dict[int, float]:  # fmt: skip
    points = memory.growth(METHODS[name], SMALL, steps, limit, 1, CPU, tick)
    return {k: point.peak for k, point in points.items()}


@pytest.mark.parametrize(
    "name", ["rm_metal/cached", "rm_metal/as_published", "imaml/gradient", "fomaml/as_published"]
)
def test_memory_that_does_not_grow(name: str) -> None:
    found = peaks(name, 1, 10)
    assert found[10] <= 1.02 * found[1]


@pytest.mark.parametrize("name", ["maml", "anil", "itd_bio"])
def test_memory_that_grows(name: str) -> None:
    """By a graph more a step; the features' cache is most of the difference, where there is one."""
    found = peaks(f"{name}/as_published", 1, 5, 9)
    assert found[9] > 3 * found[1]
    assert found[9] - found[5] == pytest.approx(found[5] - found[1], rel=0.02)
    if name != "maml":
        cached = peaks(f"{name}/cached", 1, 9)
        assert cached[9] - cached[1] < 0.05 * (found[9] - found[1])


def test_a_step_takes_at_least_what_supervised_learning_takes() -> None:
    least = memory.floor(SMALL, CPU)
    assert least > SMALL.hidden * 8 * 8 * 12 * 4  # one layer's output at least
    assert peaks("anil/cached", 1)[1] == pytest.approx(least, rel=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str) -> None:
    torch.manual_seed(0)
    algorithm = build(METHODS[name], SMALL, CPU)
    algorithm.steps = 3
    (result,) = algorithm.learn([episode(SMALL, CPU)], lambda p, t: float(cross_entropy(p, t)))
    assert result.loss == pytest.approx(result.score)
    assert all(p.grad is not None for p in list(algorithm.network.parameters())[:4])


def test_what_does_not_fit_is_left_out() -> None:
    """The forecast is a straight line through the last two peaks."""
    assert (memory.forecast({}, 10), memory.forecast({1: (10.0, 0.0)}, 10)) == (0, 0)  # type: ignore[dict-item]
    whole, ticks = peaks("itd_bio/as_published", 1, 2, 4), list[int]()
    limit = 0.5 * (whole[2] + whole[4])
    short = peaks("itd_bio/as_published", 1, 2, 4, 8, limit=limit, tick=ticks.append)
    assert list(short) == [1, 2] and sum(ticks) == 2
