"""Marks in autograd's graph where theta enters an inner loss: the tensors given to ``forward``."""

from __future__ import annotations

import copy
from collections.abc import Callable
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
