"""Peak memory against inner steps: what grows, what does not, and what is left out."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from experiments.papers.memory import (
    RAJESWARAN,
    YANG,
    Effort,
    Method,
    Point,
    Shape,
    build,
    episode,
    floor,
    forecast,
    growth,
)

SMALL = Shape(ways=3, shots=2, queries=2, channels=3, pixels=16, hidden=8)
CPU = torch.device("cpu")
FREE = Effort(limit=2.0**40, repetitions=1)


def peaks(method: Method, steps: tuple[int, ...] = (1, 10)) -> list[float]:
    points = growth(method, SMALL, steps, FREE, CPU, lambda n: None).points
    return [points[k].peak for k in steps]


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize(
    "name", ["rm_metal/cached", "rm_metal/as_published", "imaml/gradient", "fomaml/as_published"]
)
def test_memory_that_does_not_grow(name: str) -> None:
    first, last = peaks({**YANG, **RAJESWARAN}[name])
    assert last <= 1.02 * first


@pytest.mark.parametrize("name", ["maml/as_published", "anil/as_published", "itd_bio/as_published"])
def test_memory_that_grows(name: str) -> None:
    first, middle, last = peaks(YANG[name], (1, 5, 9))
    assert last > 3 * first
    assert last - middle == pytest.approx(middle - first, rel=0.02)  # a graph more a step


@pytest.mark.parametrize("name", ["anil/cached", "itd_bio/cached"])
def test_the_cache_is_most_of_the_difference(name: str) -> None:
    published = peaks(YANG[name.replace("cached", "as_published")])
    cached = peaks(YANG[name])
    assert cached[1] - cached[0] < 0.05 * (published[1] - published[0])


def test_a_step_takes_at_least_what_supervised_learning_takes() -> None:
    least = floor(SMALL, CPU)
    assert least > SMALL.hidden * 8 * 8 * 12 * 4  # one layer's output at least
    assert peaks(YANG["anil/cached"], (1,))[0] == pytest.approx(least, rel=0.1)


@pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
@pytest.mark.parametrize("name", [*YANG, *RAJESWARAN])
def test_every_method_learns(name: str) -> None:
    torch.manual_seed(0)
    algorithm = build({**YANG, **RAJESWARAN}[name], SMALL, CPU)
    algorithm.steps = 3
    (result,) = algorithm.learn([episode(SMALL, CPU)], lambda p, t: float(cross_entropy(p, t)))
    assert result.loss == pytest.approx(result.score)
    assert all(p.grad is not None for p in algorithm.theta()[:4])


def test_what_does_not_fit_is_left_out() -> None:
    method = YANG["itd_bio/as_published"]
    whole = growth(method, SMALL, (1, 2, 4), FREE, CPU, lambda n: None)
    assert whole.left_out == []
    limit = 0.5 * (whole.points[2].peak + whole.points[4].peak)
    ticks: list[int] = []
    short = growth(method, SMALL, (1, 2, 4, 8), Effort(limit, 1), CPU, ticks.append)
    assert list(short.points) == [1, 2] and short.left_out == [4, 8] and sum(ticks) == 4


def test_the_forecast_is_a_straight_line() -> None:
    points = {1: Point(10.0, 0.0), 3: Point(14.0, 0.0)}
    assert forecast(points, 10) == 28.0
    assert forecast({1: Point(10.0, 0.0)}, 10) == 0.0
