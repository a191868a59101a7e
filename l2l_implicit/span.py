r"""The inner problem of a linear head in the few coordinates in which it is not trivial.

With the basis Q of the features' span (`l2l_implicit.support_features`), the anchor a and the start
:math:`\phi^0`, every iterate of a solver that moves along gradients and Hessian products lies in

.. math:: \phi = \tilde W Q^\top + a_\perp + t e, \qquad
          e = (\phi^0 - a)_\perp / \| (\phi^0 - a)_\perp \|,

since beyond the span nothing but the regulariser acts. The coordinates :math:`u = (\tilde W, t)`,
:math:`k m + 1` of them, keep lengths and angles: in exact arithmetic the solvers' iterates are the
same.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from l2l_implicit.linear_head import LinearHeadLinearization
from l2l_implicit.linear_losses import OutputLoss
from l2l_implicit.linearization import Linearization, Products
from l2l_implicit.regularizer import SquaredDistance

_DENSE = 256  # the most unknowns of a system that is written out


class HeadInSpan:
    """From phi to the coordinates and back.

    Args:
        at: the objective linearized at the start.
    """

    def __init__(self, at: LinearHeadLinearization) -> None:
        self.basis, self.strength = at.features.basis, at.quadratic.strength
        self.classes = len(at.parameters[0])
        start, anchor = at.point, at.quadratic.center
        offset = start if anchor is None else start - anchor
        small = self.basis.project(offset)
        beyond = offset - self.basis.lift(small)
        t = beyond.norm()
        self._e = beyond.div_(t.clamp_min(torch.finfo(t.dtype).tiny))
        self._anchor = anchor
        self.center = None
        if anchor is not None:
            projected = self.basis.project(anchor)
            small = small + projected
            self._anchor = anchor - self.basis.lift(projected)
            self.center = torch.cat([projected, projected.new_zeros(1)])
        self.start = torch.cat([small, t.view(1)])

    def phi(self, u: Tensor) -> Tensor:
        """The parameters at coordinates ``u``, shapes ``[k * m + 1] -> [n]``."""
        vector = self.basis.lift(u[:-1]).addcmul_(self._e, u[-1])
        return vector if self._anchor is None else vector.add_(self._anchor)

    @cached_property
    def outer_products(self) -> Tensor:
        """Of each sample's features with themselves, ``[m, m * m]``."""
        x = self.basis.x
        return (x.unsqueeze(2) * x.unsqueeze(1)).view(len(x), -1)


class SpanLinearization(Linearization):
    """`Linearization` in the coordinates u.

    Args:
        head: what the coordinates mean.
        output_loss: the loss at ``point``.
        point: shape ``[k * m + 1]``.
    """

    closed_form = True

    def __init__(self, head: HeadInSpan, output_loss: OutputLoss, point: Tensor) -> None:
        self._head, self._output_loss = head, output_loss
        quadratic = SquaredDistance.at(head.strength, head.center)
        gradient = self._in_u(output_loss.gradient)
        super().__init__((), output_loss.value(), gradient, quadratic, point)

    def moved(self, point: Tensor) -> SpanLinearization:
        """The same objective linearized at another ``point``."""
        moved = self._output_loss.moved(self._outputs(point))
        return SpanLinearization(self._head, moved, point)

    def evaluate(self, point: Tensor) -> tuple[float, Tensor]:
        there = self.moved(point)
        return there.objective, there.gradient

    def _in_u(self, per_output: Tensor) -> Tensor:
        small = per_output.t() @ self._head.basis.x
        return torch.cat([small.view(-1), small.new_zeros(1)])

    def _outputs(self, u: Tensor) -> Tensor:
        x = self._head.basis.x
        return x @ u[:-1].view(-1, x.shape[1]).t()

    def loss_hvp(self, vector: Tensor) -> Tensor:
        return self._in_u(self._output_loss.curve(self._outputs(vector)))

    def loss_sources(self) -> list[Tensor]:
        return []

    def loss_mixed_vjp(self, vector: Tensor) -> Products:
        return []

    def newton_direction(self) -> Tensor | None:
        k, m = self._head.classes, len(self._head.basis.x)
        if k * m > _DENSE:
            return None
        blocks = self._output_loss.blocks().view(k * k, m) @ self._head.outer_products
        hessian = blocks.view(k, k, m, m).transpose(1, 2).reshape(k * m, k * m)
        hessian.diagonal().add_(self._head.strength)
        factor, failed = torch.linalg.cholesky_ex(hessian, upper=True)  # the faster half
        if bool(failed):
            return None
        gradient = self.gradient[:-1].unsqueeze(1)
        small = torch.cholesky_solve(gradient, factor, upper=True).squeeze(1)
        return torch.cat([small, self.gradient[-1:] / self._head.strength]).neg_()
