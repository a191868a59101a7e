"""`UnrolledMAML`: back-propagation through the inner loop, by way of ``higher``."""

import warnings
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.baselines.learner import BaselineLearner
from l2l_implicit.baselines.optimizers import Factory, differentiable
from l2l_implicit.inner_problem.boundary import find_meta_inputs
from l2l_implicit.inner_problem.linearization import gradients_of
from l2l_implicit.vectors import substitute


class UnrolledMAML(BaselineLearner):
    r"""Adapts a module by an optimiser whose every step is differentiated.

    With :math:`\phi^0` the module's initial value and U the optimiser's update,

    .. math:: \phi^{k+1} = U(\phi^k, \nabla_\phi \text{loss}(\theta, \phi^k)), \quad k < K,

    and ``backward()`` on a loss of the adapted learner leaves its exact derivative on theta (all
    that the losses depend on), on :math:`\phi^0` and on ``lr``. What it wraps says which it is:

    =====================  ======================================================
    MAML, FOMAML           the whole network; ``first_order=True``
    Meta-SGD               the whole network, ``lr`` a tensor for each parameter
    ANIL, fo_ANIL          the head, on features computed once, outside
    ITD-BiO                the head with ``learn_init=False``: theta is all there is to learn
    =====================  ======================================================

    The memory of the second-order variants grows with K. The module stays an ordinary
    ``nn.Module``, whose parameters are tensors with a history.

    Args:
        model: the module to adapt.
        lr: inner step size; a scalar tensor that requires grad is meta-learned. Or one tensor
            for each of the module's parameters, a scalar or of its shape, a step size for each
            entry (Meta-SGD; of either sign): ``nn.ParameterList`` makes them this learner's own.
        first_order: the gradient at the adapted point, all inner gradients taken as constants.
        allow_unused: let parameters be absent from the loss. Defaults to ``allow_nograd``.
        allow_nograd: adapt only the parameters that require grad.
        learn_init: whether a clone's initial value depends on this learner's parameters;
            otherwise it is a constant, and they get no gradient.
        optimizer: ``'sgd'``, ``'adam'``, ``'rmsprop'``, or a function of a list of parameters
            that returns a torch optimiser of a class that higher knows. Its step size is ``lr``,
            whatever the function sets; its state begins anew in every clone. The steps are
            higher's: its Adam adds epsilon before the bias correction (Kingma and Ba 2015, end of
            section 2), torch's after it.
        clip_norm: an inner gradient whose norm, over all parameters, is larger is scaled down to
            it before the optimiser sees it, and the scale is differentiated too. None: never.

    Raises:
        ImportError: without ``higher``.
        ValueError, TypeError: for a setting out of its range, in one line.

    References:
        Finn et al. (2017), Algorithm 1; Li et al. (2017), Meta-SGD, eq. (2); Raghu et al. (2020);
        Ji et al. (2020), ITD-BiO, which is eq. (3) of Yang et al. (2025); Grefenstette et al.
        (2019), higher.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit.baselines import UnrolledMAML
        >>> features, head = nn.Linear(20, 10), UnrolledMAML(nn.Linear(10, 5), lr=0.1)
        >>> x, y, loss = torch.randn(25, 20), torch.arange(25) % 5, nn.CrossEntropyLoss()
        >>> learner, h = head.clone(), features(x)
        >>> learner.adapt(lambda: loss(learner(h), y), steps=5)
        >>> loss(learner(h), y).backward()
        >>> bool(features.weight.grad.any()), bool(head.module.weight.grad.any())
        (True, True)
    """

    def __init__(
        self, model: nn.Module, lr: float | Tensor | list[Tensor] | nn.ParameterList,
        first_order: bool = False, allow_unused: bool | None = None, allow_nograd: bool = False, *,
        learn_init: bool = True, optimizer: str | Factory = "sgd", clip_norm: float | None = None,
    ) -> None:  # fmt: skip
        each: Any = lr if isinstance(lr, list | nn.ParameterList) else None
        one: Any = lr if each is None else 1.0
        super().__init__(model, one, first_order, allow_unused, allow_nograd)
        if each is not None:
            checks.step_sizes(each, list(model.parameters()))
            self.lr = each
        self.learn_init, self.optimizer, self.clip_norm = learn_init, optimizer, clip_norm
        self._update: Any = None
        self._made_by: tuple[Any, ...] = ()  # the update's settings
        self._make_update(list(model.parameters()))  # fails now if at all
        checks.hidden_names(self, model)

    def _begin(self, parent: Self) -> None:
        self._update = None

    def _make_update(self, parameters: Sequence[Tensor]) -> None:
        if self.clip_norm is not None:
            checks.positive("clip_norm", self.clip_norm)
        self._made_by = self.optimizer, self.clip_norm
        self._update = differentiable(self.optimizer, parameters)

    def _step(self, loss: Tensor, unused: bool, first_order: bool, keep: bool) -> None:
        parameters = list(self.module.parameters())
        lr = self.lr.reshape(()) if isinstance(self.lr, Tensor) else self.lr
        lrs = list(lr) if isinstance(lr, list | nn.ParameterList) else [lr]
        if self._update is None or self._made_by != (self.optimizer, self.clip_norm):
            self._make_update(parameters)
            learned = self.learn_init or any(getattr(rate, "requires_grad", False) for rate in lrs)
            if keep and not (learned or first_order or find_meta_inputs(loss, parameters).leaves):
                warnings.warn(
                    "adapt: expected an inner loss of something to be meta-learned, got one of the "
                    "adapted parameters alone; pass features with their graph, or learn_init=True",
                    stacklevel=3,
                )
        unrolled = keep and not first_order
        adapted = [p for p in parameters if p.requires_grad]
        found = gradients_of(loss, adapted, create_graph=unrolled, allow_unused=True)
        checks.used(found, unused)
        if not unrolled:
            checks.dense(found)
        clipped = iter(self._clipped(found))
        gradients = [next(clipped) if p.requires_grad else None for p in parameters]
        start = parameters if unrolled else [p.detach() for p in parameters]
        with torch.set_grad_enabled(keep):
            new = self._update.step(
                torch.zeros((), requires_grad=True),  # higher need not look: gradients are known
                start,
                override={"lr": lrs},
                grad_callback=lambda _: gradients,
            )
            if keep and first_order:
                # Whatever the optimiser makes of gradients and parameters is a constant too.
                triples = zip(parameters, start, new, strict=True)
                new = [p + (q - c) if p.requires_grad else p for p, c, q in triples]
        if not keep:
            pairs = zip(parameters, new, strict=True)
            new = [q.requires_grad_(p.requires_grad) for p, q in pairs]
        substitute(self.module, parameters, new)

    def _clipped(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients, scaled down if they are too long; the scale has a derivative too."""
        if self.clip_norm is None:
            return gradients
        norm = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
        if not float(norm.detach()) > self.clip_norm:
            return gradients
        return [None if g is None else g * (self.clip_norm / norm) for g in gradients]
