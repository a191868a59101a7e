"""Small tasks and heads, for tests of what a learner does, and the two ways of adapting one."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l2l_implicit import UnsolvedWarning

Y = torch.arange(6) % 3
HOWS = pytest.mark.parametrize("how", ["loss", "closure"])
FLOAT64 = pytest.mark.usefixtures("float64")
UNSOLVED_OR_NOT = pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning")
unsolved = partial(pytest.warns, UnsolvedWarning)
ERRORS = TypeError, ValueError, RuntimeError, FloatingPointError


def adapt(learner: Any, loss: Callable[[], Tensor], how: str, steps: int) -> None:
    """By a closure, or by loss tensors in a loop, as learn2learn's scripts have it."""
    if how == "closure":
        learner.adapt(loss, steps=steps)
        return
    for _ in range(steps):
        learner.adapt(loss())


@contextmanager
def silent(category: type[Warning] = Warning) -> Iterator[None]:
    """Within, a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", category)
        yield


def message(run: Callable[[], object], kind: Any = ERRORS) -> str:
    """The text of the error that a call ends in: one line, with what to do."""
    with pytest.raises(kind) as caught:
        run()
    text = str(caught.value)
    assert "\n" not in text and "expected" in text and "got" in text
    assert text.count(";") + text.count(":") >= 1, "no remedy after the finding"
    return text


def network() -> nn.Sequential:
    """A whole network for `x`."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def x() -> Tensor:
    return torch.randn(6, 4)


def fit(learner: Any, inputs: Tensor, how: str = "loss", steps: int = 8) -> None:
    """Adapt to six examples."""
    adapt(learner, lambda: F.cross_entropy(learner(inputs), Y), how, steps)


def nets() -> dict[str, nn.Module]:
    """Heads for `x`."""
    return {
        "linear": nn.Linear(4, 3),
        "deep": nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)),
        "batch norm": nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)),
    }


class Made(nn.Module):
    """Parts by name, and what it computes of itself and its inputs."""

    def __init__(self, run: Callable[..., Any] | None, **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)
