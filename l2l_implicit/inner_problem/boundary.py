"""Marks in autograd's graph: where theta enters an inner loss, and where an inner step has ended.

Theta enters by the tensors given to ``forward``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from l2l_implicit.mixed_precision import widened


class Boundary(Function):
    """A copy of a tensor with history, through which theta enters the inner loss.

    The node it leaves in the graph is the record: it has saved its source (and so autograd frees
    it, and notices if it was overwritten), and knows whether a gradient with respect to phi has
    ever passed (``inner``), in which case it is no boundary. The copy may have a wider dtype.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, dtype: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(source)
        ctx.inner = False
        wide = widened(source, dtype)
        return source.clone() if wide is source else wide

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.inner = True
        return gradient, None  # autograd rounds it to the source's dtype


def mark_boundaries(value: Any, dtype: torch.dtype | None = None) -> Any:
    """``value`` with every tensor that has history, in lists, tuples and dicts too, marked.

    With a ``dtype``, tensors of half precision are widened to it.
    """

    def mark(tensor: Tensor) -> Any:
        known = not tensor.requires_grad
        return widened(tensor, dtype) if known else Boundary.apply(tensor, dtype)

    return map_tensors(mark, value)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to its tensors, in lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, part) for part in value))
    if type(value) is tuple:
        return tuple(map_tensors(function, part) for part in value)
    if isinstance(value, list | dict):
        mapped = copy.copy(value)  # keeps a class of the caller's own
        for key in range(len(value)) if isinstance(value, list) else value:
            mapped[key] = map_tensors(function, value[key])
        return mapped
    return value


def is_boundary(node: Any) -> bool:
    """Whether a node of the graph is a `Boundary` that no gradient of phi has passed."""
    return isinstance(node, Boundary._backward_cls) and not node.inner  # type: ignore[attr-defined]


def end_of_gradients(leaves: Iterable[Tensor]) -> None:
    """Make it an error that ``backward()`` leaves a gradient in ``leaves``, of a past inner step.

    The gradient belongs to theta, and there is no way on from here.
    """
    for leaf in leaves:
        leaf.register_post_accumulate_grad_hook(_refuse)


def _refuse(leaf: Tensor) -> None:
    lost, leaf.grad = leaf.grad, None
    if lost is not None and bool(lost.any()):
        raise RuntimeError(
            "expected a loss of the learner's current parameters, got one that depends on those of "
            "an inner step: features or outputs that a closure kept from one of its calls; compute "
            "them before adapt(), anew in each call, or after adapt()"
        )
