"""The inner regulariser that needs no autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l2l_implicit.vectors import flatten, unflatten


class SquaredDistance:
    r"""The regulariser :math:`R(\phi) = (l_2/2) \|\phi - a\|^2` of T tasks and its derivatives.

    Args:
        l2: its coefficient, a float or a scalar tensor (part of theta if it requires grad).
        anchor: the tensors ``a``, in phi's shapes, empty for zero.
        dtype: what to compute in.

    Attributes:
        strength: the coefficient, R's curvature in every direction.
        center: ``a`` as one vector, shape ``[n]``, detached; None for zero.
    """

    def __init__(self, l2: float | Tensor, anchor: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._l2 = l2 if isinstance(l2, Tensor) and l2.requires_grad else None
        self._anchor = anchor
        self.center = flatten(a.detach() for a in anchor).to(dtype) if anchor else None
        self.strength = float(l2.detach()) if isinstance(l2, Tensor) else float(l2)

    def same(self, other: SquaredDistance) -> bool:
        """Whether both are one function of phi and theta, at its present values."""
        if self.strength != other.strength or self._l2 is not other._l2:
            return False
        if len(self._anchor) != len(other._anchor):
            return False
        if any(a is not b for a, b in zip(self._anchor, other._anchor, strict=True)):
            return False
        return self.center is None or torch.equal(self.center, other.center)  # type: ignore[arg-type]

    def offset(self, point: Tensor) -> Tensor:
        """phi - a, shapes ``[T, n]``."""
        return point if self.center is None else point - self.center

    def value(self, point: Tensor) -> Tensor:
        """R at ``point``, ``[T, n] -> [T]``."""
        return 0.5 * self.strength * self.offset(point).square().sum(1)

    def add_gradient(self, gradient: Tensor, point: Tensor) -> Tensor:
        """``gradient`` plus R's at ``point``, shapes ``[T, n]``."""
        return gradient.add(self.offset(point), alpha=self.strength)

    def add_hvp(self, product: Tensor, vector: Tensor) -> Tensor:
        """``product`` plus R's Hessian times ``vector``, shapes ``[T, n]``."""
        return product.add(vector, alpha=self.strength)

    def sources(self) -> list[Tensor]:
        """The tensors of theta that R depends on: ``l2``, then the anchor."""
        return [*([] if self._l2 is None else [self._l2]), *self._anchor]

    def mixed_vjp(self, point: Tensor, vector: Tensor) -> list[Tensor | None]:
        """Mixed products with ``vector``, summed over the tasks, one for each of `sources`."""
        products: list[Tensor | None] = []
        if self._l2 is not None:
            products.append((self.offset(point) * vector).sum().to(self._l2).view_as(self._l2))
        if self._anchor:
            pull = vector.sum(0).mul_(-self.strength).to(self._anchor[0].dtype)
            products += unflatten(pull, self._anchor)
        return products
