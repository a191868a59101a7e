"""What the baselines share: learn2learn's contract, with closures, and no graph where none is due.

A baseline says how it takes one inner step; everything else about ``clone`` and ``adapt`` is here.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from learn2learn.algorithms import MAML
from learn2learn.utils import clone_module
from torch import Tensor, nn

from l2l_implicit import checks
from l2l_implicit.inner_problem import refusals
from l2l_implicit.vectors import shallow_copy

Closure = Callable[[], Tensor]


class BaselineLearner(MAML):
    """learn2learn's MAML whose ``adapt`` also takes a closure; arguments as there."""

    _links_to_initial = True  # whether a clone's parameters have a history

    def __init__(
        self, model: nn.Module, lr: float | Tensor, first_order: bool = False,
        allow_unused: bool | None = None, allow_nograd: bool = False,
    ) -> None:  # fmt: skip
        checks.runs_as_it_is(model)
        several = isinstance(lr, list | nn.ParameterList)
        if several or (isinstance(lr, Tensor) and lr.numel() != 1):
            got = "several" if several else f"a tensor of shape {tuple(lr.shape)}"  # type: ignore[union-attr]
            raise ValueError(
                f"lr: expected one number, got {got}; pass one step size for all parameters"
            )
        checks.positive("lr", lr)
        super().__init__(model, lr, first_order, allow_unused, allow_nograd)

    @abstractmethod
    def _step(self, loss: Tensor, unused: bool, first_order: bool, keep: bool) -> None:
        """One inner step; without ``keep`` the new parameters are leaves."""

    def _begin(self, parent: Self) -> None:
        """Called on a clone as soon as it is one."""

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> Self:  # fmt: skip
        """A learner for one task, whose parameters are copies of this one's.

        As in learn2learn, buffers that need no gradient (batch norm's) are shared, not copied.
        Flags are as in the constructor; None keeps its value.
        """
        clone = shallow_copy(self)
        links = self._links_to_initial and getattr(self, "learn_init", True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and links):
            clone.module = clone_module(self.module)
        pairs = zip(clone.module.parameters(), self.module.parameters(), strict=True)
        for copied, initial in pairs:
            copied.requires_grad_(initial.requires_grad)  # a copy without a history loses it
        clone.__dict__.update(checks.flags(self, first_order, allow_unused, allow_nograd))
        clone._begin(self)
        return clone

    def adapt(
        self, loss: Tensor | Closure, first_order: bool | None = None,
        allow_unused: bool | None = None, allow_nograd: bool | None = None, *,
        steps: int | None = None,
    ) -> None:  # fmt: skip
        """One inner step from a loss tensor, or ``steps`` of them from a closure.

        Under ``torch.no_grad()`` a closure is evaluated with gradients enabled, and nothing is
        kept from one step to the next. Flags are as in the constructor, for this call.

        Args:
            loss: a scalar, or a closure (no arguments) that returns the learner's present loss.
            steps: the number K of steps; with a closure only.

        Raises:
            ValueError: if the loss is no finite scalar that depends on the parameters.
        """
        flags = checks.flags(self, first_order, allow_unused, allow_nograd)
        first_order, unused, nograd = flags.values()
        checks.adapt(loss, steps)
        checks.inner_parameters(self.module, nograd)
        keep, call = torch.is_grad_enabled(), (lambda: loss) if isinstance(loss, Tensor) else loss
        with torch.enable_grad():
            for _ in range(steps or 1):  # no name for the loss: its graph ends with the step
                try:
                    self._step(checks.loss(call()), unused, first_order, keep)
                except RuntimeError as error:
                    if "second time" not in str(error):
                        raise
                    raise RuntimeError(refusals.of_gradients(error)) from error
