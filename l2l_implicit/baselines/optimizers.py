"""The inner optimiser: by name, or made by the user's own factory."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, SGD, Adam, Optimizer, RMSprop

from l2l_implicit import checks

Factory = Callable[[list[Tensor]], Optimizer]
BY_NAME: dict[str, Factory] = {"sgd": SGD, "adam": Adam, "rmsprop": RMSprop}
# Settings of torch's optimisers that higher gets wrong in silence.
WRONG = {
    "maximize": "which it ignores",
    "decoupled_weight_decay": "which it ignores",
    "centered": "whose derivative is not a number wherever a gradient is zero",
}


def make_optimizer(choice: str | Factory, parameters: Sequence[Tensor]) -> Optimizer:
    """An optimiser of the parameters (leaves); its step size is for the caller to set."""
    if isinstance(choice, str):
        checks.choice("optimizer", choice, BY_NAME)
        return BY_NAME[choice](list(parameters))
    if not callable(choice):
        raise TypeError(
            f"optimizer: expected a name or a function of the parameters, got {choice!r}; try "
            "'sgd', or lambda parameters: torch.optim.SGD(parameters, momentum=0.9)"
        )
    optimizer = choice(list(parameters))
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "optimizer: expected the function to return a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; return one made of the parameters it is given"
        )
    own = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if sorted(own) != sorted(map(id, parameters)) or isinstance(optimizer, LBFGS):
        raise ValueError(
            "optimizer: expected one of all the parameters that the function is given, and no "
            f"others, whose step() needs no closure, got {type(optimizer).__name__} of {len(own)} "
            f"parameters where {len(parameters)} are given; try torch.optim.SGD(parameters)"
        )
    return optimizer


def differentiable(choice: str | Factory, like: Sequence[Tensor]) -> Any:
    """``higher``'s version of an optimiser of such parameters, with a step size for each."""
    try:
        import higher
    except ModuleNotFoundError:
        raise ImportError(
            "UnrolledMAML: expected the package higher, got none installed; "
            "pip install l2l-implicit[baselines], or use Learn2LearnMAML"
        ) from None
    leaves = placeholders(like)  # higher copies the parameters it is given
    optimizer = make_optimizer(choice, leaves)
    groups = optimizer.param_groups
    apart = {id(p): {**group, "params": [p]} for group in groups for p in group["params"]}
    groups[:] = [apart[id(p)] for p in leaves]  # whatever groups the user has made
    try:
        update = higher.get_diff_optim(optimizer, leaves)
    except ValueError:
        raise ValueError(
            "optimizer: expected one that higher can differentiate, got "
            f"{type(optimizer).__name__}; try SGD, Adam or RMSprop, or higher.register_optim()"
        ) from None
    for name, why in WRONG.items():
        if any(group.get(name) for group in groups):
            raise ValueError(
                f"optimizer: expected settings that higher differentiates, got {name}=True, {why}; "
                "leave it out"
            )
    return update


def placeholders(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Leaves in the parameters' shapes, of one element's memory each; never none."""
    alike = [p.detach().new_zeros(()).expand(p.shape) for p in parameters]
    return [leaf.requires_grad_() for leaf in alike or [torch.zeros(1)]]
