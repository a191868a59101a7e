"""`Reptile`: the outer gradient is the way that the inner loop went."""

from typing import Self

import torch
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.baselines.learner import BaselineLearner
from l2l_implicit.baselines.optimizers import Factory, make_optimizer, placeholders
from l2l_implicit.inner_problem.linearization import inner_gradient


class Reptile(BaselineLearner):
    r"""Adapts a whole network by plain steps, and learns its initial value from where they lead.

    There is no query loss: `outer_gradient` of an adapted clone leaves

    .. math:: \text{weight} \cdot (\phi^0 - \phi^K)

    on the original's parameters. A plain outer step of size :math:`\epsilon` is then Algorithm 1
    of the paper, :math:`\phi^0 \gets \phi^0 + \epsilon (\phi^K - \phi^0)`, and with
    ``weight=1/n`` for each of n tasks its batched version; an adaptive outer optimiser does not
    see the scale. ``weight=1/(lr * K)`` gives the mean inner gradient instead.

    Args:
        model, allow_unused, allow_nograd: as of `UnrolledMAML`.
        lr: inner step size, a number.
        first_order: of no consequence, as nothing is differentiated twice.
        optimizer: as of `UnrolledMAML`, of any class, and torch's own step. The paper's is Adam
            with ``betas=(0.0, 0.999)``.

    References:
        Nichol, Achiam, Schulman (2018), Algorithms 1 and 2.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.baselines import Reptile
        >>> reptile = Reptile(nn.Linear(20, 5), lr=0.1)
        >>> x, y, loss = torch.randn(25, 20), torch.arange(25) % 5, nn.CrossEntropyLoss()
        >>> learner = reptile.clone()
        >>> learner.adapt(lambda: loss(learner(x), y), steps=5)
        >>> learner.outer_gradient()
        >>> reptile.module.weight.grad.shape
        torch.Size([5, 20])
    """

    _links_to_initial = False

    def __init__(
        self, model: nn.Module, lr: float, first_order: bool = False,
        allow_unused: bool | None = None, allow_nograd: bool = False, *,
        optimizer: str | Factory = "sgd",
    ) -> None:  # fmt: skip
        if isinstance(lr, Tensor) and lr.requires_grad:
            raise TypeError(
                "lr: expected a number, got a tensor that requires grad; Reptile differentiates "
                "no inner step, so lr cannot be meta-learned: pass float(lr)"
            )
        super().__init__(model, lr, first_order, allow_unused, allow_nograd)
        make_optimizer(optimizer, placeholders(model.parameters()))  # fails now if at all
        self.optimizer = optimizer
        self._inner: torch.optim.Optimizer | None = None
        self._made_by: str | Factory = optimizer  # whose it is
        checks.hidden_names(self, model)
        self._original: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def outer_gradient(self, weight: float = 1.0) -> None:
        """Add ``weight * (initial - adapted)`` to ``.grad`` of the original's parameters.

        The initial value is the original's present one: call this before the outer step.

        Raises:
            RuntimeError: on a learner that is no clone.
        """
        if not self._original:
            raise RuntimeError(
                "outer_gradient: expected an adapted clone, got the original; call it on a clone()"
            )
        for initial, adapted in zip(self._original, self.module.parameters(), strict=True):
            if initial.requires_grad:
                way = weight * (initial - adapted)
                initial.grad = way if initial.grad is None else initial.grad + way

    def _begin(self, parent: Self) -> None:
        self._inner = None
        self._original = parent._original or tuple(parent.module.parameters())

    def _step(self, loss: Tensor, unused: bool, first_order: bool, keep: bool) -> None:
        phi: list[Tensor] = [p for p in self.module.parameters() if p.requires_grad]
        gradients = inner_gradient(loss, phi, unused)
        if self._inner is None or self._made_by != self.optimizer:
            self._inner, self._made_by = make_optimizer(self.optimizer, phi), self.optimizer
        for group in self._inner.param_groups:
            group["lr"] = float(self.lr)
        for p, gradient in zip(phi, gradients, strict=True):
            p.grad = gradient
        self._inner.step()
        torch.clear_autocast_cache()  # it has the weights as they were
        for p in phi:
            p.grad = None
