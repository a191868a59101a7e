"""One pass of a module as a record: it runs again, with its derivative by forward mode."""

import contextlib
import functools
import inspect
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode

from l2l_implicit.inner_problem.boundary import depends_on_phi, mark_outputs, tensors_of
from l2l_implicit.vectors import RandomState, buffers_apart, shallow_copy, substitute


@functools.cache
def _load_forward_mode() -> None:
    """What torch loads at the first use says that a part of torch is deprecated: not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def noted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The module's output, its tensors marked with the `Pass` that gave them."""
    made_by = Pass(module)
    value = module(*args, **kwargs)
    made_by.arguments = args, kwargs
    made_by.differentiable = [tensor.requires_grad for tensor in tensors_of(value)]
    return mark_outputs(value, made_by)


class Pass:
    """One pass of a module, as a record from which it can be run again.

    Made before the pass: of a module that shares the parameters and has buffers of its own, so that
    another pass leaves running statistics alone, and of the state of the random numbers.
    """

    arguments: tuple[Sequence[Any], dict[str, Any]]  # positional and by name
    differentiable: list[bool]  # which of the tensors that it gave have a history

    def __init__(self, module: nn.Module) -> None:
        self._module = _twin(module, {})
        parameters = [*self._module.parameters()]
        self.parameters = {*map(id, parameters)}
        self._random = RandomState(parameters[0].device if parameters else torch.device("cpu"))

    def inner_inputs(self) -> bool:
        """Whether an input depends on phi, as far as gradients have shown it."""
        return any(map(depends_on_phi, tensors_of([*self.arguments])))

    @torch.no_grad()
    def tangents(
        self, phi: Sequence[Tensor], direction: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor | None]]:
        """The outputs again, each with its derivative along ``direction``; None for zero.

        Raises:
            NotImplementedError: torch's own, for an operation without forward mode.
        """
        positional, named = self.arguments
        apart = buffers_apart(self._module)
        _load_forward_mode()
        modes = _attention_in_steps(), _BatchNormTangents()
        with forward_ad.dual_level(), apart, self._random.again(), modes[0], modes[1]:
            pairs = zip(phi, direction, strict=True)
            duals = [forward_ad.make_dual(p.detach(), d) for p, d in pairs]
            substitute(self._module, phi, duals)
            try:
                outputs = tensors_of(self._module(*positional, **named))
            finally:
                substitute(self._module, duals, phi)
            kept = itertools.compress(outputs, self.differentiable)
            return [(z, d) for z, d in map(forward_ad.unpack_dual, kept)]


def _twin(module: nn.Module, known: dict[int, Any]) -> Any:
    """A copy of a module and all below it that shares parameters, with buffers of its own."""
    if id(module) in known:
        return known[id(module)]
    known[id(module)] = copy = shallow_copy(module)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            copy._buffers[name] = known.setdefault(id(buffer), buffer.detach().clone())
    for name, child in module._modules.items():
        copy._modules[name] = child if child is None else _twin(child, known)
    return copy


def _attention_in_steps() -> contextlib.AbstractContextManager[Any]:
    """Within, attention is computed by operations that have a forward mode; its kernels have none.

    Torch cannot be told so before 2.3: there its own choice remains.
    """
    with contextlib.suppress(ImportError):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()


class _BatchNormTangents(TorchFunctionMode):
    r"""Batch norm's derivative in half the memory of torch's own, whose formula keeps nine tensors.

    With :math:`x_c = x - \mu`, :math:`r = (\sigma^2 + \epsilon)^{-1/2}`, means over all but the
    channels, and for batch statistics :math:`m_1 = \text{mean}(\dot x)`,
    :math:`m_2 = r \, \text{mean}(x_c \dot x)`, else 0,

    .. math:: \dot y = \gamma r \, \dot x + (\dot\gamma r - \gamma r^2 m_2) \, x_c
              + \dot\beta - \gamma r \, m_1 .
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not batch_norm:
            return function(*args, **kwargs)
        given = inspect.signature(batch_norm).bind(*args, **kwargs)
        given.apply_defaults()
        own = given.arguments
        parts = map(own.get, ("input", "weight", "bias"))
        (x, dx), (gamma, dgamma), (beta, dbeta) = (
            (None, None) if t is None else forward_ad.unpack_dual(t) for t in parts
        )
        if x is None or dx is None or (gamma is not None and gamma.dtype != x.dtype):
            return function(*args, **kwargs)
        shape = [1, -1, *(1,) * (x.dim() - 2)]
        over = [d for d in range(x.dim()) if d != 1]
        if own["training"]:
            var, mean = torch.var_mean(x, over, correction=0)
        else:
            var, mean = own["running_var"], own["running_mean"]
        r, centred = (var + own["eps"]).rsqrt(), x - mean.view(shape)
        scale = r if gamma is None else gamma * r
        slope = torch.zeros_like(r) if dgamma is None else dgamma * r
        shift = torch.zeros_like(r) if dbeta is None else dbeta
        if own["training"]:
            slope = slope - scale * r * r * (centred * dx).mean(over)
            shift = shift - scale * dx.mean(over)
        dy = centred.mul_(slope.view(shape)).addcmul_(dx, scale.view(shape))
        dy.add_(shift.view(shape))
        own |= {"input": x, "weight": gamma, "bias": beta}
        return forward_ad.make_dual(function(*given.args, **given.kwargs), dy)
