"""Inner and linear solvers by name, and features in clusters, for tests of linear heads."""

from typing import Any

import torch
from torch import Tensor

from l2l_implicit import CG, LBFGS, Direct, GradientDescent, Neumann, Newton

WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "LBFGS": {"inner": LBFGS()},
    "gradient descent": {"inner": GradientDescent()},
    "adaptive descent": {"inner": GradientDescent(adaptive=True)},
    "few products": {"inner": Newton(cg_steps=2), "linear": CG(steps=2)},
    "Neumann": {"linear": Neumann()},
    "direct": {"linear": Direct()},
}


def clustered(ways: int, shots: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Support and query features of norm about ``sqrt(2 width)``."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(ways, width, generator=generator)
    labels = torch.arange(ways * shots) % ways
    support = torch.randn(len(labels), width, generator=generator) + centres[labels]
    queries = torch.randn(len(labels), width, generator=generator) + centres[labels]
    return support, queries
