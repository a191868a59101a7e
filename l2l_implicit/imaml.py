"""`ImplicitMAML`: the preset of Rajeswaran et al. (2019)."""

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
    `ImplicitCGHead`. The paper's Hessian-free variant is ``inner=Newton(cg_steps=5),
    linear=CG(steps=5)``: five CG steps for the search direction and for the meta-gradient, and a
    line search on the regularised training loss.

    The default ``l2=0.5`` is the paper's on miniImageNet, not its 2.0 on Omniglot, which leaves a
    task half a gradient step; the released code has no such term in the inner loop.

    Give a convolutional network ``curvature=GaussNewton()`` (docs/choosing.md). The default, the
    Hessian, is eq. (6) as it stands, exact where the inner problem is solved; a few steps from
    theta it is indefinite there, and the meta-gradients of most tasks are noise.

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
        self, model: nn.Module, lr: float, first_order: bool = False,
        allow_unused: bool | None = None, allow_nograd: bool = False, *,
        l2: float | Tensor = 0.5, anchor: str = "init",
        inner: InnerSolver = GradientDescent(),  # noqa: B008  (frozen)
        **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            model, lr, first_order, allow_unused, allow_nograd, l2=l2, anchor=anchor, inner=inner,
            **settings,
        )  # fmt: skip
