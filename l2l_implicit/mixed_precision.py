r"""Autocast and gradient scaling: the inner problem and its linear system keep phi's precision.

A hypergradient is as exact as the point it is taken at and the system it comes from; rounded to
bfloat16, neither converges beyond two digits. So the learner's module, the inner solver and the
linear solver run in phi's precision whatever autocast says, and what is expensive, the backbone,
runs outside of the learner and in low precision. Its features are widened where they enter, and
their hypergradient is rounded where it leaves, as autocast does with any gradient.

The hypergradient is linear in the loss, :math:`v = H^{-1} (c\, b) = c\, H^{-1} b`, and the solvers'
tolerances are relative: a scaled loss scales it, no more.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_BY_DEVICE = hasattr(torch, "get_autocast_dtype")  # from torch 2.4 on


def autocast_enabled(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    if _BY_DEVICE:
        return torch.is_autocast_enabled(device)
    return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which operations keep their operands' precision."""
    if autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def as_now(function: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    """``function`` with autocast as it is now, wherever it is called."""
    return torch.autocast(device)(function) if autocast_enabled(device) else function


def precision_of(module: nn.Module) -> tuple[str, torch.dtype] | None:
    """Device type and dtype of a module's parameters if autocast is on there, else None."""
    for first in module._parameters.values():  # a layer's own need no search
        if first is not None:
            break
    else:
        first = next(module.parameters(), None)
    if first is None or not autocast_enabled(first.device.type):
        return None
    return first.device.type, first.dtype


def widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as ``dtype`` if that is wider than the half precision it has."""
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


@contextlib.contextmanager
def overflow_skips(scaler: Any, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Turns an overflow within into infinite gradients, which make a scaler skip the step.

    A learner raises ``FloatingPointError`` where half precision has overflowed: at ``adapt`` for
    the features, in ``backward`` for the loss. Without a scaler that is what one wants to know;
    with one, overflow is expected: it leaves the step out and lowers its scale. A disabled one
    leaves nothing out, and a scale below 1 is no overflow's doing: then the error stays.

    Args:
        scaler: a ``torch.amp.GradScaler``.
        parameters: theta, what the scaler's optimiser moves.

    Example:
        >>> import torch
        >>> from l2l_implicit.mixed_precision import overflow_skips
        >>> theta = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([theta], lr=0.1)
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # "cuda" on a GPU
        >>> with overflow_skips(scaler, [theta]):
        ...     raise FloatingPointError("as a learner does")
        >>> _ = scaler.step(optimizer)
        >>> scaler.update()
        >>> theta.tolist(), scaler.get_scale()
        ([1.0, 1.0], 2.0)
    """
    try:
        yield
    except FloatingPointError:
        if scaler is None or not scaler.is_enabled() or scaler.get_scale() < 1.0:
            raise
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, torch.inf)
            scaler.scale(parameter.new_zeros(()))  # it knows no scale before it is first asked
