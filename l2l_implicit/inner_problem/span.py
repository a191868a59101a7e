r"""The inner problem of a linear head in the few coordinates in which it is not trivial.

With the basis Q of the features' span (`l2l_implicit.inner_problem.support_features`), the anchor a
and the start :math:`\phi^0`, every iterate of a solver that moves along gradients and Hessian
products lies in

.. math:: \phi = \tilde W Q^\top + a_\perp + t e, \qquad
          e = (\phi^0 - a)_\perp / \| (\phi^0 - a)_\perp \|,

since beyond the span nothing but the regulariser acts. The coordinates are the matrix
:math:`U = (\tilde W, t e_1)`, ``[k, m + 1]``, as if there were one more feature, always zero; they
keep lengths and angles, so in exact arithmetic the solvers' iterates are the same. Two exceptions:
torch's L-BFGS, whose first step has a 1-norm in it, and an estimated step size, whose power
iteration starts elsewhere.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from l2l_implicit.inner_problem.linear_head import LinearHeadLinearization
from l2l_implicit.inner_problem.linear_losses import OutputLoss
from l2l_implicit.inner_problem.linearization import Linearization, Products
from l2l_implicit.inner_problem.regularizer import SquaredDistance

_DENSE = 260  # the most unknowns of a system that is written out


class HeadInSpan:
    """From phi to the coordinates and back.

    Args:
        at: the objective linearized at the start.

    Attributes:
        x: the features with the one that is zero, shape ``[m, m + 1]``.
        start: the coordinates of the start, shape ``[k * (m + 1)]``.
        quadratic: the regulariser as a function of the coordinates.
    """

    def __init__(self, at: LinearHeadLinearization) -> None:
        self._basis, anchor = at.features.basis, at.quadratic.center
        self.classes, m = len(at.parameters[0]), len(at.features.x)
        self.x = torch.nn.functional.pad(self._basis.x, (0, 1))
        offset = at.point if anchor is None else at.point - anchor
        small = self._basis.project(offset)
        beyond = offset - self._basis.lift(small)
        t = beyond.norm()
        self._e = beyond.div_(t.clamp_min(torch.finfo(t.dtype).tiny))
        self.start = offset.new_zeros(self.classes, m + 1)
        self.start[:, :m] = small.view(self.classes, m)
        self.start[0, m] = t
        self.start, self._anchor, center = self.start.view(-1), anchor, None
        if anchor is not None:
            projected = self._basis.project(anchor)
            self._anchor = anchor - self._basis.lift(projected)
            center = torch.nn.functional.pad(projected.view(self.classes, m), (0, 1)).view(-1)
            self.start = self.start + center
        self.quadratic = SquaredDistance.at(at.quadratic.strength, center)

    def phi(self, u: Tensor) -> Tensor:
        """The parameters at coordinates ``u``, shapes ``[k * (m + 1)] -> [n]``."""
        matrix = u.view(self.classes, -1)
        vector = self._basis.lift(matrix[:, :-1].reshape(-1)).addcmul_(self._e, matrix[0, -1])
        return vector if self._anchor is None else vector.add_(self._anchor)

    @cached_property
    def outer_products(self) -> Tensor:
        """Of each sample's features with themselves, ``[m, (m + 1)^2]``."""
        return (self.x.unsqueeze(2) * self.x.unsqueeze(1)).view(len(self.x), -1)


class SpanLinearization(Linearization):
    """`Linearization` in the coordinates u.

    Args:
        head: what the coordinates mean.
        output_loss: the loss at ``point``.
        point: shape ``[k * (m + 1)]``.
    """

    closed_form = True

    def __init__(self, head: HeadInSpan, output_loss: OutputLoss, point: Tensor) -> None:
        self._head, self._output_loss = head, output_loss
        gradient = self._in_u(output_loss.gradient)
        super().__init__((), output_loss.value, gradient, head.quadratic, point)

    def moved(self, point: Tensor) -> SpanLinearization:
        """The same objective linearized at another ``point``."""
        moved = self._output_loss.moved(self._outputs(point))
        return SpanLinearization(self._head, moved, point)

    def evaluate(self, point: Tensor) -> tuple[float, Tensor]:
        there = self.moved(point)
        return there.objective, there.gradient

    def _in_u(self, per_output: Tensor) -> Tensor:
        return (per_output.t() @ self._head.x).view(-1)

    def _outputs(self, u: Tensor) -> Tensor:
        return self._head.x @ u.view(self._head.classes, -1).t()

    def loss_hvp(self, vector: Tensor) -> Tensor:
        return self._in_u(self._output_loss.curve(self._outputs(vector)))

    def loss_sources(self) -> list[Tensor]:
        return []

    def loss_mixed_vjp(self, vector: Tensor) -> Products:
        return []

    def newton_direction(self) -> Tensor | None:
        k, (m, width) = self._head.classes, self._head.x.shape
        if k * width > _DENSE:
            return None
        blocks = self._output_loss.blocks().view(k * k, m) @ self._head.outer_products
        hessian = blocks.view(k, k, width, width).transpose(1, 2).reshape(k * width, -1)
        hessian.diagonal().add_(self._head.quadratic.strength)
        factor, failed = torch.linalg.cholesky_ex(hessian, upper=True)  # the faster half
        if bool(failed):
            return None
        direction = torch.cholesky_solve(self.gradient.unsqueeze(1), factor, upper=True)
        return direction.squeeze(1).neg_()
