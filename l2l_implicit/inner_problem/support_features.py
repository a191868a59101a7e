r"""The features that a linear head is adapted to, and the few directions in which they lie.

Of a weight's rows only the part in the span of the :math:`m` features meets the loss. With an
orthonormal basis :math:`Q` of that span, :math:`X = \tilde X Q^\top`, the inner problem in
:math:`W Q` has the small features :math:`\tilde X` (``[m, m]``) and is otherwise the same; on the
complement nothing but the regulariser is left. Few-shot learning has fewer samples than features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SupportFeatures:
    """Features X with where they came from.

    Args:
        x: shape ``[m, d]``, detached; a copy that nobody else writes to.
        source: the tensor with history that ``x`` is a copy of, or None.
        bias: whether the head adds a bias: a feature that is always one.
    """

    def __init__(self, x: Tensor, source: Tensor | None, bias: bool) -> None:
        self.x, self.source, self.bias = x, source, bias
        self._identity = None if source is None else _identity(source)
        self._basis: Basis | None = None

    def equal(self, other: SupportFeatures) -> bool:
        """Whether both are the same numbers, from the same source.

        Each keeps its source alive, so that no other can have taken its place in memory.
        """
        same = self._identity == other._identity and self.bias == other.bias
        return same and torch.equal(self.x, other.x)

    def reducible(self) -> bool:
        """Whether the span is small enough to be worth a basis."""
        m, d = self.x.shape
        return 2 * m <= d + self.bias

    @property
    def basis(self) -> Basis:
        """Of the span; computed once."""
        if self._basis is None:
            self._basis = Basis(self.x, self.bias)
        return self._basis


class Basis:
    """An orthonormal basis of the features' span, by QR; a bias counts as a feature of ones.

    Attributes:
        x: the features in that basis, shape ``[m, m]``.
    """

    def __init__(self, x: Tensor, bias: bool) -> None:
        m, self._width = x.shape
        columns = torch.cat([x, x.new_ones(m, 1)], 1) if bias else x
        self._q, r = torch.linalg.qr(columns.t())
        self.x, self._bias = r.t().contiguous(), bias

    def project(self, vector: Tensor) -> Tensor:
        """A vector of phi's ``n`` entries in the basis, shape ``[k * m]``."""
        classes = vector.numel() // len(self._q)
        weight = vector[: classes * self._width].view(classes, self._width)
        small = weight @ self._q[: self._width]
        if self._bias:
            small.addr_(vector[classes * self._width :], self._q[self._width])
        return small.view(-1)

    def lift(self, small: Tensor) -> Tensor:
        """Back to ``n`` entries."""
        weights = small.view(-1, self._q.shape[1]) @ self._q.t()
        if not self._bias:
            return weights.view(-1)
        return torch.cat([weights[:, : self._width].reshape(-1), weights[:, self._width]])

    def split(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The part in the span, in the basis, and the rest; twice, which is enough."""
        small = self.project(vector)
        rest = vector - self.lift(small)
        correction = self.project(rest)
        return small.add_(correction), rest.sub_(self.lift(correction))


def _identity(tensor: Tensor) -> Sequence[object]:
    """What two tensors share only if they are the same data with the same history."""
    return (
        tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride(), tensor.dtype,
        tensor.device, tensor.grad_fn, tensor.output_nr,
    )  # fmt: skip
