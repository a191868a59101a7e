r"""Differentiate the solution of the inner problem without its history.

Invariant. The adapted parameters :math:`\phi` satisfy :math:`\nabla_\phi g(\theta, \phi) = 0`.
Differentiating it in :math:`\theta`, with :math:`H = \nabla^2_\phi g` and
:math:`b = \nabla_\phi f`,

.. math:: \frac{d f}{d \theta} = \nabla_\theta f - \nabla^2_{\theta\phi} g \, v,
          \qquad H v = b. \qquad \text{(Yang et al. 2025, eq. 4 to 8)}

The query loss brings :math:`\nabla_\theta f` by ordinary autograd; `ImplicitSolution` adds the
rest.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from l2l_implicit import checks
from l2l_implicit.inner_problem.linearization import Linearization, Products
from l2l_implicit.mixed_precision import without_autocast
from l2l_implicit.vectors import flatten, unflatten

Solve = Callable[[Linearization, Tensor], Tensor]


class Cell:
    """Holds the one linearization of a learner until it is used or superseded.

    Args:
        linearization: of the inner objective at (about) the solution.
        solve: maps it and ``b`` to the ``v`` of ``H v = b``, shapes ``[n]``.
    """

    def __init__(self, linearization: Linearization, solve: Solve) -> None:
        self.linearization: Linearization | None = linearization
        self._solve = solve

    def hypergradient(self, b: Tensor) -> Products:
        """The implicit part of eq. (8): one product for each source of the linearization."""
        if self.linearization is not None:
            v = self._solve(self.linearization, b)
            return self.linearization.mixed_vjp(-v)
        if bool((b == 0).all()):
            return []
        raise RuntimeError(
            "expected a loss of the learner's current parameters, got one that depends on "
            "parameters which a later adapt() has replaced and whose linearization is gone: "
            "compute the loss after the last adapt(), or adapt a second clone()"
        )


class ImplicitSolution(Function):
    """The adapted parameters as a function of theta: identity forward, eq. (8) backward.

    The edges go to the sources of theta alone, never to the inner loop, so no history is kept.
    The linearization lives in a `Cell` owned by the node's saved tensor: autograd drops it after
    ``backward()`` as it drops any saved tensor, and ``retain_graph=True`` keeps it.
    """

    @staticmethod
    def forward(
        ctx: Any, cell: Cell, vector: Tensor, like: Sequence[Tensor], *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.cell = weakref.ref(cell)
        ctx.save_for_backward(vector)
        ctx.shapes = [source.shape for source in sources]
        return tuple(unflatten(vector, like))

    @staticmethod
    def backward(ctx: Any, *b: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # torch's own error if the graph has been freed
        if torch.is_grad_enabled():  # once_differentiable lets some second derivatives slip by
            raise RuntimeError(
                "expected a first derivative of the adapted learner's loss, got create_graph=True; "
                "the hypergradient cannot be differentiated again: detach it, or use unrolled MAML"
            )
        vector = flatten(b)
        with without_autocast(vector.device.type):
            products = ctx.cell().hypergradient(vector)
        checks.finite_products(products)
        products += [None] * (len(ctx.shapes) - len(products))
        zero = vector.new_zeros(())
        pairs = zip(products, ctx.shapes, strict=True)
        dense = (zero.expand(shape) if product is None else product for product, shape in pairs)
        return (None, None, None, *dense)


def attach(
    cell: Cell, vector: Tensor, like: Sequence[Tensor], constants: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Phi with its implicit gradient.

    Args:
        cell: holds the linearization; after this call the graph alone owns it.
        vector: phi, shape ``[n]``, detached.
        like: tensors whose shapes phi takes.
        constants: tensors that phi does not depend on but that get an explicit zero gradient.
    """
    assert cell.linearization is not None
    sources = [*cell.linearization.sources(), *constants]
    with saved_tensors_hooks(lambda _: cell, lambda _: vector.new_empty(0)):
        return ImplicitSolution.apply(cell, vector, like, *sources)
