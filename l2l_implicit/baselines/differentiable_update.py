"""An inner optimiser's step as a differentiable function, by way of ``higher``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l2l_implicit import checks
from l2l_implicit.baselines.optimizers import Factory, make_optimizer, placeholders
from l2l_implicit.inner_problem.linearization import inner_gradient

# Settings of torch's optimisers that higher gets wrong in silence.
WRONG = {
    "maximize": "which it ignores",
    "decoupled_weight_decay": "which it ignores",
    "centered": "whose derivative is not a number wherever a gradient is zero",
}


def require_higher() -> Any:
    """The package ``higher``, which only the unrolled baselines need."""
    try:
        import higher
    except ModuleNotFoundError:
        raise ImportError(
            "UnrolledMAML: expected the package higher, got none installed; "
            "pip install l2l-implicit[baselines], or use Learn2LearnMAML"
        ) from None
    return higher


class DifferentiableUpdate:
    """One task's inner optimiser with its state.

    Args:
        choice: the optimiser, by name or as a factory.
        like: the parameters it will update; their shapes, dtypes and devices are looked at.
        clip_norm: the longest gradient that it is given, all parameters' as one vector; a longer
            one is scaled down to it. None: as it is.

    Raises:
        ImportError: without higher.
        ValueError: for an optimiser or a setting that higher does not support.
    """

    def __init__(
        self, choice: str | Factory, like: Sequence[Tensor], clip_norm: float | None = None
    ) -> None:
        higher, self._clip_norm = require_higher(), clip_norm
        if clip_norm is not None:
            checks.positive("clip_norm", clip_norm)
        leaves = placeholders(like)  # higher copies the parameters it is given
        optimizer = make_optimizer(choice, leaves)
        groups = optimizer.param_groups  # one for each parameter, which may have its own step size
        apart = {id(p): {**group, "params": [p]} for group in groups for p in group["params"]}
        groups[:] = [apart[id(p)] for p in leaves]  # whatever groups the user has made
        try:
            self._higher = higher.get_diff_optim(optimizer, leaves)
        except ValueError:
            raise ValueError(
                "optimizer: expected one that higher can differentiate, got "
                f"{type(optimizer).__name__}; try SGD, Adam or RMSprop, or higher.register_optim()"
            ) from None
        for name, why in WRONG.items():
            if any(group.get(name) for group in optimizer.param_groups):
                raise ValueError(
                    f"optimizer: expected settings that higher differentiates, got {name}=True, "
                    f"{why}; leave it out"
                )

    def unrolled(
        self, loss: Tensor, parameters: Sequence[Tensor], lrs: Sequence[Any], unused: bool
    ) -> list[Tensor]:
        """The next parameters, with the whole history of the step; one step size, or one each."""

        def check(gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
            pairs = zip(gradients, parameters, strict=True)
            checks.used([g for g, p in pairs if p.requires_grad], unused)
            return self._clipped(gradients)

        return self._higher.step(loss, parameters, override={"lr": lrs}, grad_callback=check)

    def first_order(
        self, loss: Tensor, parameters: Sequence[Tensor], lrs: Sequence[Any], unused: bool
    ) -> list[Tensor]:
        """The next parameters, as far as gradients go a constant away from these (and from lr).

        Inner gradients, and whatever the optimiser makes of them and of the parameters, are
        constants: a momentum or a weight decay too. Where no gradients are kept, leaves.
        """
        adapted = [p for p in parameters if p.requires_grad]
        with torch.enable_grad():
            found = iter(inner_gradient(loss, adapted, unused))
        gradients = [next(found) if p.requires_grad else None for p in parameters]
        constants = [p.detach() for p in parameters]
        new = self._higher.step(
            torch.zeros((), requires_grad=True),  # higher need not look: the gradients are known
            constants,
            override={"lr": lrs},
            grad_callback=lambda _: self._clipped(gradients),
        )
        if not torch.is_grad_enabled():
            return [q.requires_grad_(p.requires_grad) for p, q in zip(parameters, new, strict=True)]
        triples = zip(parameters, constants, new, strict=True)
        return [p + (q - c) if p.requires_grad else p for p, c, q in triples]

    def _clipped(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The gradients, scaled down if they are too long; the scale has a derivative too."""
        if self._clip_norm is None:
            return gradients
        norm = torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt()
        if not float(norm.detach()) > self._clip_norm:
            return gradients
        return [None if g is None else g * (self._clip_norm / norm) for g in gradients]

