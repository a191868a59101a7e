"""`Learn2LearnMAML`: learn2learn's own MAML class, as a second engine."""

from learn2learn.algorithms import MAML
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.baselines.learner import BaselineLearner
from l2l_implicit.vectors import substitute


class Learn2LearnMAML(BaselineLearner):
    """``learn2learn.algorithms.MAML`` with ``adapt(closure, steps=K)``, also under ``no_grad``.

    Every inner step is learn2learn's own, as are the arguments. On a head it is ANIL.

    References:
        Finn et al. (2017), Algorithm 1; Raghu et al. (2020).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.baselines import Learn2LearnMAML
        >>> maml = Learn2LearnMAML(nn.Linear(20, 5), lr=0.1)
        >>> x, y, loss = torch.randn(25, 20), torch.arange(25) % 5, nn.CrossEntropyLoss()
        >>> learner = maml.clone()
        >>> learner.adapt(lambda: loss(learner(x), y), steps=5)
        >>> loss(learner(x), y).backward()
        >>> maml.module.weight.grad.shape
        torch.Size([5, 20])
    """

    def _step(self, loss: Tensor, unused: bool, first_order: bool, keep: bool) -> None:
        phi = list(self.module.parameters())
        # With both flags learn2learn raises what autograd does; without, it prints and goes on.
        MAML.adapt(self, loss, first_order or not keep, allow_unused=True, allow_nograd=True)
        new = list(self.module.parameters())
        pairs = list(zip(new, phi, strict=True))
        try:
            checks.used([None if n is p else n for n, p in pairs if p.requires_grad], unused)
        except ValueError:
            substitute(self.module, new, phi)
            raise
        if not keep:
            leaves = [n.detach().requires_grad_(p.requires_grad) for n, p in pairs]
            substitute(self.module, new, leaves)
