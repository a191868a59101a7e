r"""The common case in closed form: cross-entropy or squared error of a linear head.

With features :math:`X` (``[m, d]``), outputs :math:`Z = X W^\top + c` (``[m, k]``), the loss's
gradient :math:`G` and Hessian product :math:`S = \nabla^2_Z \, U` in the outputs
(`l2l_implicit.inner_problem.linear_losses`), and a direction :math:`(V, e)` with
:math:`U = X V^\top + e`:

.. math:: \nabla_W = G^\top X, \quad \nabla_c = G^\top 1, \qquad
          \nabla^2_\phi \, (V, e) = (S^\top X, S^\top 1), \qquad
          \nabla^2_{X\phi} \, (V, e) = G V + S W.

A few products of small matrices, no autograd. Any other head or loss takes the general path.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from l2l_implicit.inner_problem.linear_losses import OutputLoss
from l2l_implicit.inner_problem.linearization import Linearization, Products
from l2l_implicit.inner_problem.recognition import LinearHeadLoss, recognize
from l2l_implicit.inner_problem.regularizer import SquaredDistance
from l2l_implicit.inner_problem.support_features import SupportFeatures
from l2l_implicit.linear_solvers.solution import LinearSolution, LinearSolver, of_larger_system

__all__ = ["LinearHeadLinearization", "recognize"]

_DENSE = 256  # the most unknowns of a system that is written out


class LinearHeadLinearization(Linearization):
    """`Linearization` of a `LinearHeadLoss`; phi is the weight, or weight and bias."""

    closed_form = True

    def __init__(
        self,
        loss: float | None,
        parts: LinearHeadLoss,
        parameters: Sequence[Tensor],
        quadratic: SquaredDistance,
        point: Tensor | None = None,
    ) -> None:
        self.parts = parts
        self.features: SupportFeatures = parts.features
        self.output_loss: OutputLoss = parts.loss
        gradient = self._in_phi(self.output_loss.gradient)
        value = self.output_loss.value if loss is None else loss
        super().__init__(parameters, value, gradient, quadratic, point)
        self.quadratic = quadratic

    def _in_phi(self, per_output: Tensor) -> Tensor:
        """The gradient in phi of a function whose gradient in the outputs is ``per_output``."""
        weight = (per_output.t() @ self.features.x).view(-1)
        return torch.cat([weight, per_output.sum(0)]) if self.features.bias else weight

    def _outputs(self, vector: Tensor) -> Tensor:
        """The head's outputs ``[m, k]`` with phi = ``vector``."""
        weight = self._weight(vector)
        if self.features.bias:
            return torch.addmm(vector[weight.numel() :], self.features.x, weight.t())
        return self.features.x @ weight.t()

    def _weight(self, vector: Tensor) -> Tensor:
        shape = self.parameters[0].shape
        return vector[: shape.numel()].view(shape)

    def loss_hvp(self, vector: Tensor) -> Tensor:
        return self._in_phi(self.output_loss.curve(self._outputs(vector)))

    def loss_sources(self) -> list[Tensor]:
        return [] if self.features.source is None else [self.features.source]

    def loss_mixed_vjp(self, vector: Tensor) -> Products:
        if self.features.source is None:
            return []
        loss, change = self.output_loss, self.output_loss.curve(self._outputs(vector))
        return [loss.gradient @ self._weight(vector) + change @ self._weight(self.point)]

    def evaluate(self, point: Tensor) -> tuple[float, Tensor]:
        moved = self.output_loss.moved(self._outputs(point))
        gradient = self.quadratic.add_gradient(self._in_phi(moved.gradient), point)
        return moved.value() + self.quadratic.value(point), gradient

    def moved(self, point: Tensor) -> LinearHeadLinearization:
        """The same objective linearized at another ``point``, shape ``[n]``."""
        output_loss = self.output_loss.moved(self._outputs(point))
        parts = LinearHeadLoss(self.features, output_loss)
        return LinearHeadLinearization(None, parts, self.parameters, self.quadratic, point)

    def solve(self, b: Tensor, solver: LinearSolver, start: Tensor | None = None) -> LinearSolution:
        """In the features' span a like system of ``k * m`` unknowns; beyond it, ``l2 v = b``."""
        if not self.reducible():
            return super().solve(b, solver, start)
        basis = self.features.basis
        small, rest = basis.split(b)
        matvec = self._small_hvp if self._small_hessian is None else self._small_hessian.mv
        answer = solver(matvec, small, None if start is None else basis.project(start))
        v = rest.div_(self.quadratic.strength).add_(basis.lift(answer.solution))
        return of_larger_system(answer, v, b)

    def newton_direction(self) -> Tensor | None:
        if not self.reducible() or self._small_hessian is None:
            return None
        factor, failed = torch.linalg.cholesky_ex(self._small_hessian)
        if bool(failed):
            return None
        strength, basis = self.quadratic.strength, self.features.basis
        small = basis.project(self.gradient)
        v = torch.cholesky_solve(small.unsqueeze(1), factor).squeeze(1)
        beyond = basis.lift(small.div_(strength).sub_(v))
        return beyond.sub_(self.gradient, alpha=1.0 / strength)

    def reducible(self) -> bool:
        """Whether the problem is smaller in the features' span."""
        return self.quadratic.strength > 0 and self.features.reducible()

    def _small_hvp(self, vector: Tensor) -> Tensor:
        """`hvp` in the basis of the features' span, shapes ``[k * m]``."""
        x = self.features.basis.x
        change = self.output_loss.curve(x @ vector.view(-1, x.shape[1]).t())
        return self.quadratic.add_hvp((change.t() @ x).view(-1), vector)

    @cached_property
    def _small_hessian(self) -> Tensor | None:
        """The matrix of `_small_hvp`, where it is small; a product with it costs one call."""
        classes, x = len(self.parameters[0]), self.features.basis.x
        if classes * len(x) > _DENSE:
            return None
        weighted = self.output_loss.blocks().unsqueeze(3) * x  # [k, k, m, m]
        blocks = x.t() @ weighted
        hessian = blocks.transpose(1, 2).reshape(classes * len(x), -1)
        hessian.diagonal().add_(self.quadratic.strength)
        return hessian

    def same_problem(self, parts: LinearHeadLoss) -> bool:
        """Whether ``parts`` are of the very loss, features and phi that this was made of."""
        same = torch.equal(self.output_loss.outputs, parts.loss.outputs)
        return same and self.parts.equal(parts)

    def same_objective(self, other: LinearHeadLinearization) -> bool:
        """Whether the two are of one loss of one set of features, at whatever phi."""
        return self.quadratic is other.quadratic and self.parts.equal(other.parts)
