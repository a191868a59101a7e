r"""Differentiate the solution of the inner problem without its history.

Invariant. The adapted parameters :math:`\phi` satisfy :math:`\nabla_\phi g(\theta, \phi) = 0`.
Differentiating it in :math:`\theta`, with :math:`H = \nabla^2_\phi g` and
:math:`b = \nabla_\phi f`,

.. math:: \frac{d f}{d \theta} = \nabla_\theta f - \nabla^2_{\theta\phi} g \, v,
          \qquad H v = b. \qquad \text{(Yang et al. 2025, eq. 4 to 8)}

The query loss brings :math:`\nabla_\theta f` by ordinary autograd; `ImplicitSolution` adds the
rest. T tasks meet only in what they share, the anchor and l2, whose hypergradients are sums.
"""

import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Size, Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from l2l_implicit import checks
from l2l_implicit.inner_problem.linearization import Linearization
from l2l_implicit.linear_solvers.solution import LinearSolution
from l2l_implicit.mixed_precision import without_autocast

Solve = Callable[[Linearization, Tensor], LinearSolution]


@dataclass(eq=False)
class SavedLinearization:
    """Holds the one linearization of a learner until it is used or superseded."""

    linearization: Linearization | None  # of the inner objectives at (about) the solution
    solve: Solve  # maps it and b to the v of H v = b, shapes [T, n]
    unreached: Callable[[], None]  # for where eq. (8) has the query loss's own gradient alone


class ImplicitSolution(Function):
    """The adapted parameters as a function of theta: identity forward, eq. (8) backward.

    The edges go to the sources of theta alone, never to the inner loop, so no history is kept.
    The linearization is owned by the node's saved tensor: autograd drops it after ``backward()`` as
    it drops any saved tensor, and ``retain_graph=True`` keeps it.
    """

    @staticmethod
    def forward(
        ctx: Any, saved: SavedLinearization, phi: Tensor, shapes: Sequence[Size], *sources: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.saved = weakref.ref(saved)
        ctx.save_for_backward(phi)
        ctx.tasks, ctx.sources = len(phi), [*map(SHAPE, sources)]
        return split(phi, shapes)

    @staticmethod
    def backward(ctx: Any, *b: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # torch's own error if the graph has been freed
        if torch.is_grad_enabled():  # once_differentiable lets some second derivatives slip by
            raise RuntimeError(
                "expected a first derivative of the adapted learner's loss, got create_graph=True; "
                "the hypergradient cannot be differentiated again: detach it, or use unrolled MAML"
            )
        if "Batched" in repr(torch._C._dispatch_keys(b[0])):
            raise RuntimeError(
                "backward: expected one gradient of the adapted learner's outputs, got a batch of "
                "them (is_grads_batched, vectorize=True, vmap); take them one after the other"
            )
        vector = torch.cat([*map(operator.methodcaller("reshape", ctx.tasks, -1), b)], 1)
        saved: SavedLinearization = ctx.saved()
        at, products = saved.linearization, []
        if at is not None:
            with without_autocast(vector.device.type):
                answer = saved.solve(at, vector.to(at.point.dtype))
                products = at.mixed_vjp(answer) if answer.products is None else answer.products
            if not checks.finite_products(products):
                saved.unreached()
        elif bool(vector.any()):
            raise RuntimeError(
                "expected a loss of the learner's current parameters, got one that depends on "
                "parameters which a later adapt() has replaced and whose linearization is gone: "
                "compute the loss after the last adapt(), or adapt a second clone()"
            )
        gradients: list[Tensor | None] = [None, None, None]
        for product, shape in zip_longest(products, ctx.sources):
            dense = vector.new_zeros(shape) if product is None else product.neg()
            gradients.append(dense)
        return tuple(gradients)


SHAPE = operator.attrgetter("shape")


def split(phi: Tensor, shapes: Sequence[Size]) -> tuple[Tensor, ...]:
    """Vectors ``[T, n]`` as tensors of the given shapes, which hold all T tasks."""
    sizes = []
    for shape in shapes:
        sizes.append(shape.numel() // len(phi))
    pieces = map(Tensor.reshape, phi.split(sizes, dim=1), shapes)
    return tuple(map(Tensor.clone, pieces))  # no views, so that they can be written to


def attach(
    saved: SavedLinearization, phi: Tensor, shapes: Sequence[Size], constants: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Phi, ``[T, n]`` and detached, in tensors of these ``shapes`` with its implicit gradient.

    Args:
        saved: holds the linearization; after this call the graph alone owns it.
        constants: tensors that phi does not depend on but that get an explicit zero gradient.
    """
    assert saved.linearization is not None
    if torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        raise RuntimeError(
            "adapt: expected hooks on saved tensors, one of which holds what backward() needs, got "
            "disable_saved_tensors_hooks(); adapt outside of it, or under torch.no_grad()"
        )
    sources = [*saved.linearization.sources(), *constants]
    empty = phi.new_empty(0)  # phi itself is to live no longer than the caller needs it
    with saved_tensors_hooks(lambda _: saved, lambda _: empty):
        return ImplicitSolution.apply(saved, phi, shapes, *sources)
