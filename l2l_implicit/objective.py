"""The inner problem of a learner: its objective, linearized where a loss was computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from learn2learn.algorithms import MAML
from torch import Tensor

from l2l_implicit.inner_problem.linear_head import LinearHeadLinearization
from l2l_implicit.inner_problem.linearization import AutogradLinearization, Linearization
from l2l_implicit.inner_problem.recognition import LinearHeadLoss, recognize
from l2l_implicit.inner_problem.regularizer import SquaredDistance
from l2l_implicit.task import Task
from l2l_implicit.vectors import substitute, unflatten


class InnerObjective(MAML):
    """Loss plus regulariser, as a function of the module's parameters phi."""

    anchor: str
    _task: Task

    @abstractmethod
    def regularizer(self, parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
        """The inner regulariser, a scalar."""

    @abstractmethod
    def _closed_form(self, anchor: Sequence[Tensor]) -> SquaredDistance | None:
        """The regulariser without autograd, if there is one."""

    def _put(self, vector: Tensor, now: Sequence[Tensor]) -> list[Tensor]:
        """Make ``vector`` the module's parameters, as leaves: no graph behind them."""
        leaves = [piece.requires_grad_() for piece in unflatten(vector.detach(), now)]
        substitute(self.module, now, leaves)
        return leaves

    def _recognize(self, loss: Tensor, phi: list[Tensor]) -> LinearHeadLoss | None:
        """The closed form of ``loss``, where the regulariser has one too."""
        task = self._task
        if task.quadratic is None:
            task.quadratic = self._closed_form(self._anchor_of(phi))
        return None if task.quadratic is None else recognize(loss, phi, task.independent)

    def _linearize(
        self,
        loss: Tensor,
        phi: list[Tensor],
        unused: bool,
        differentiable: bool,
        parts: LinearHeadLoss | None,
    ) -> Linearization:
        quadratic = self._task.quadratic
        if quadratic is None:
            return self._linearize_all(loss, phi, unused, differentiable)
        if parts is not None:
            point = self._task.vector_of(phi)
            return LinearHeadLinearization(float(loss.detach()), parts, phi, quadratic, point)
        return AutogradLinearization(
            loss, phi, quadratic=quadratic, unused=unused, differentiable=differentiable
        )

    def _linearize_all(
        self, loss: Tensor, phi: list[Tensor], unused: bool, differentiable: bool
    ) -> Linearization:
        """With a regulariser of the user's own, which autograd carries like the loss."""
        anchor = self._anchor_of(phi)
        stand_ins = [a.detach().requires_grad_() for a in anchor]
        center = stand_ins or [torch.zeros_like(p) for p in phi]
        return AutogradLinearization(
            loss + self.regularizer(phi, center),
            phi,
            anchor=anchor,
            stand_ins=stand_ins,
            unused=unused,
            differentiable=differentiable,
        )

    def _anchor_of(self, phi: Sequence[Tensor]) -> list[Tensor]:
        """The initial values of phi; empty where the anchor is zero."""
        return self._initial_of(phi) if self.anchor == "init" else []

    def _initial_of(self, phi: Sequence[Tensor]) -> list[Tensor]:
        if len(phi) == len(self._task.initial):
            return self._task.initial
        adapted = {id(p) for p in phi}
        pairs = zip(self._task.initial, self.module.parameters(), strict=True)
        return [initial for initial, p in pairs if id(p) in adapted]
