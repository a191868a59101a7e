"""`ImplicitMAML`: the preset of Rajeswaran et al. (2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l2l_implicit.inner_solvers.gradient_descent import GradientDescent
from l2l_implicit.inner_solvers.protocol import InnerSolver
from l2l_implicit.learner import ImplicitCGHead


class ImplicitMAML(ImplicitCGHead):
    r"""Implicit MAML: every parameter adapts, anchored at the meta-learned initial value.

    `ImplicitCGHead` with ``anchor='init'`` and gradient steps:

    .. math:: \min_\phi \; \text{loss}(\phi) + \tfrac{\lambda}{2} \|\phi - \theta\|^2,
              \qquad \lambda = \texttt{l2}.

    Takes the place of ``learn2learn.algorithms.MAML(model, lr)``; arguments as there and in
    `ImplicitCGHead`. The default ``l2=2.0`` is the paper's on Omniglot (0.5 on miniImageNet).
    The paper's Hessian-free variant is ``inner=Newton(cg_steps=5), linear=CG(steps=5)``: five CG
    steps for the search direction and for the meta-gradient, and a line search on the regularised
    training loss.

    Give a convolutional network ``linear=CG(damping=20)``. A few steps from theta its training loss
    is not convex; eq. (6) then divides by curvatures near or below ``-l2``, and the meta-gradients
    of most tasks are noise. The paper does not say so, its released code does: it solves
    ``(2 I + H / (l2 + 10)) v = b``, H of the loss alone, which is ``damping = l2 + 20`` up to a
    factor. The default, 0, is eq. (6), exact where the inner problem is solved.

    References:
        Rajeswaran et al. (2019), Algorithms 1 and 2, eq. (6), and section 4.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitMAML
        >>> maml = ImplicitMAML(nn.Linear(20, 5), lr=0.1)
        >>> x, y, loss = torch.randn(25, 20), torch.arange(25) % 5, nn.CrossEntropyLoss()
        >>> learner = maml.clone()
        >>> learner.adapt(lambda: loss(learner(x), y), steps=16)
        >>> loss(learner(x), y).backward()
        >>> maml.module.weight.grad.shape
        torch.Size([5, 20])
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
        *,
        l2: float | Tensor = 2.0,
        anchor: str = "init",
        inner: InnerSolver = GradientDescent(),  # noqa: B008  (frozen)
        **settings: Any,
    ) -> None:
        super().__init__(
            model,
            lr,
            first_order,
            allow_unused,
            allow_nograd,
            l2=l2,
            anchor=anchor,
            inner=inner,
            **settings,
        )
