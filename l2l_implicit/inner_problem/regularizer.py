"""The inner regulariser that needs no autograd."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from l2l_implicit.vectors import flatten, unflatten


class SquaredDistance:
    r"""The regulariser :math:`R(\phi) = (l_2/2) \|\phi - a\|^2` and its derivatives.

    Args:
        l2: its coefficient, a float or a scalar tensor (part of theta if it requires grad).
        anchor: the tensors ``a``, in phi's shapes, or None for zero.
    """

    def __init__(self, l2: float | Tensor, anchor: Sequence[Tensor] | None) -> None:
        self._l2 = l2 if isinstance(l2, Tensor) and l2.requires_grad else None
        self._anchor = anchor
        self.center = None if anchor is None else flatten(a.detach() for a in anchor)
        self._coefficient = float(l2.detach()) if isinstance(l2, Tensor) else float(l2)

    @property
    def strength(self) -> float:
        """The coefficient: R's curvature in every direction."""
        return self._coefficient

    @classmethod
    def at(cls, strength: float, center: Tensor | None) -> SquaredDistance:
        """With a number for l2 and a vector ``[n]`` for the anchor, neither a part of theta."""
        found = cls(strength, None)
        found.center = center
        return found

    def _offset(self, point: Tensor) -> Tensor:
        return point if self.center is None else point - self.center

    def value(self, point: Tensor) -> float:
        """R at ``point``, shape ``[n]``."""
        offset = self._offset(point)
        return 0.5 * self._coefficient * float(offset.dot(offset))

    def add_gradient(self, gradient: Tensor, point: Tensor) -> Tensor:
        """``gradient`` plus R's at ``point``, shapes ``[n]``."""
        return gradient.add(self._offset(point), alpha=self._coefficient)

    def add_hvp(self, product: Tensor, vector: Tensor) -> Tensor:
        """``product`` plus R's Hessian times ``vector``, shapes ``[n]``."""
        return product.add(vector, alpha=self._coefficient)

    def sources(self) -> list[Tensor]:
        """The tensors of theta that R depends on: ``l2``, then the anchor."""
        return [*([] if self._l2 is None else [self._l2]), *(self._anchor or ())]

    def mixed_vjp(self, point: Tensor, vector: Tensor) -> list[Tensor | None]:
        """Mixed products with ``vector``, one for each of `sources`."""
        products: list[Tensor | None] = []
        if self._l2 is not None:
            products.append(self._offset(point).dot(vector).view_as(self._l2))
        if self._anchor is not None:
            products += unflatten(vector * -self._coefficient, self._anchor)
        return products
