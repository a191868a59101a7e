"""`ImplicitGBML`: learn2learn's gradient transforms, as the metric of the regulariser."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from learn2learn.optim import ParameterUpdate
from torch import Tensor, nn

from l2l_implicit.learner import ImplicitCGHead

Transform = Callable[[Tensor], nn.Module | None]


class ImplicitGBML(ImplicitCGHead):
    r"""Adapts a module's parameters under a meta-learned metric.

    Takes the place of ``learn2learn.algorithms.GBML(module, transform, lr)``. There a transform
    :math:`T` (Kronecker-factored, meta-curvature, ...) changes each gradient step, which the
    solution of the inner problem would not notice. Here it measures the distance:

    .. math:: \min_\phi \; \text{loss}(\theta, \phi) + \tfrac{l_2}{2} \|T(\phi - a)\|^2 .

    T is part of theta. Where it begins as the identity (Kronecker factors, meta-curvature), the
    learner begins as `ImplicitCGHead`.
    Where GBML learns longer steps, the distance shrinks here: T is to be compared with the inverse.

    Args:
        module: whose parameters are phi.
        transform: makes T's part for a parameter, a module that keeps its shape, or None for the
            identity; see ``learn2learn.optim``. Not used if there is a ``compute_update``.
        lr, first_order, allow_unused, allow_nograd: as in `ImplicitCGHead`.
        adapt_transform: only False; T does not change within a task.
        compute_update: a ``learn2learn.optim.ParameterUpdate`` that holds the transforms already.
        settings: the keyword arguments of `ImplicitCGHead`.

    References:
        Arnold et al. (2021), KFO; Park, Oliva (2019), Meta-Curvature; Rajeswaran et al. (2019),
        section 6, for a learned regulariser.

    Example:
        >>> import learn2learn as l2l
        >>> import torch
        >>> from torch import nn
        >>> from l2l_implicit import ImplicitGBML
        >>> kronecker = l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)
        >>> gbml = ImplicitGBML(nn.Linear(8, 3), kronecker, lr=0.1)
        >>> x, y, loss = torch.randn(9, 8), torch.arange(9) % 3, nn.CrossEntropyLoss()
        >>> learner = gbml.clone()
        >>> learner.adapt(lambda: loss(learner(x), y), steps=10)
        >>> loss(learner(x), y).backward()
        >>> gbml.compute_update.transforms_modules[0].transform.left.grad.shape
        torch.Size([3, 3])
    """

    def __init__(
        self, module: nn.Module, transform: Transform | None = None, lr: float = 1.0,
        adapt_transform: bool = False, first_order: bool = False,
        allow_unused: bool | None = None, allow_nograd: bool = False, *,
        compute_update: ParameterUpdate | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(module, lr, first_order, allow_unused, allow_nograd, **settings)
        if adapt_transform:
            raise ValueError(
                "adapt_transform: expected False, got True; the transform is meta-learned, but the "
                "inner problem keeps it: use learn2learn's GBML to change it within a task"
            )
        if compute_update is None:
            if not callable(transform):
                raise TypeError(
                    f"transform: expected one of learn2learn.optim, got {transform!r}; pass "
                    "KroneckerTransform(KroneckerLinear), or compute_update="
                )
            compute_update = ParameterUpdate(module.parameters(), transform)
        if not isinstance(compute_update, ParameterUpdate):
            got = type(compute_update).__name__
            raise TypeError(f"compute_update: expected learn2learn's, got {got}; or pass transform")
        self.compute_update = compute_update

    def regularizer(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        r""":math:`(l_2/2) \|T(\phi - a)\|^2`, a scalar."""
        transforms = self._transforms(parameters)
        offsets = [p - a for p, a in zip(parameters, anchor, strict=True)]
        moved = [o if t is None else t(o) for o, t in zip(offsets, transforms, strict=True)]
        return 0.5 * self.l2 * torch.stack([m.square().sum() for m in moved]).sum()

    def _transforms(self, parameters: Sequence[Tensor]) -> list[nn.Module | None]:
        """T's parts for ``parameters``, which are all of the module's or those that adapt."""
        update, own = self.compute_update, list(self.module.parameters())
        if len(own) != len(update.transforms_indices):
            raise ValueError(
                f"compute_update: expected one made for the module's {len(own)} parameters, got "
                f"one for {len(update.transforms_indices)}; make it from module.parameters()"
            )
        places = {id(p): index for p, index in zip(own, update.transforms_indices, strict=True)}
        found = [places[id(p)] for p in parameters]
        return [None if index is None else update.transforms_modules[index] for index in found]
