"""learn2learn's FOMAML: gradient steps whose own derivative is the identity."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.inner_problem.linearization import inner_gradient
from l2l_implicit.vectors import substitute


def first_order_steps(
    module: nn.Module,
    losses: Callable[[], Tensor],
    phi: list[Tensor],
    *,
    lr: float,
    unused: bool,
    steps: int,
) -> None:
    """``steps`` gradient steps of size ``lr`` on the loss itself, which ``losses`` computes."""
    for _ in range(steps):
        gradients = inner_gradient(checks.loss(losses()), phi, unused)
        pairs = zip(phi, gradients, strict=True)
        new = [p if g is None else p - lr * g for p, g in pairs]
        substitute(module, phi, new)
        phi = new
