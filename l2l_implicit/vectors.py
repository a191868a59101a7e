"""A module's parameters as one flat vector, and back; and other tensors in their place.

The solvers see one vector; the module keeps its tensors. Everything that converts lives here.
"""

import contextlib
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate tensors of any shapes into one vector of their ``n`` elements, shape ``[n]``."""
    return torch.cat([*map(_FLAT, tensors)])


_FLAT = operator.methodcaller("reshape", -1)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``vector`` (shape ``[n]``) in the shapes of ``like``: the inverse of `flatten`."""
    pieces = vector.split([*map(Tensor.numel, like)])
    return [*map(Tensor.view_as, pieces, like)]


def substitute(module: nn.Module, old: Sequence[Tensor], new: Sequence[Tensor]) -> None:
    """Put ``new`` tensors where ``old`` parameters stand in ``module``, shared ones everywhere.

    The tensors themselves are left alone, so graphs and other modules that hold them are too.
    """
    replacement = dict(zip(map(id, old), new, strict=True))
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if id(parameter) in replacement:
                part._parameters[name] = replacement[id(parameter)]  # type: ignore[assignment]
        if isinstance(part, nn.RNNBase):  # its cached list of weights must see the new tensors
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]


@contextlib.contextmanager
def buffers_apart(module: nn.Module) -> Iterator[None]:
    """Within, the module has copies of its buffers; then the buffers themselves, untouched.

    Writing the old values back would not do: autograd refuses a graph that has saved one of them.
    """
    own = [(part, part._buffers.copy()) for part in module.modules()]
    copies = {id(b): b if b.requires_grad else b.detach().clone() for b in module.buffers()}
    for part, buffers in own:
        part._buffers.update((k, b if b is None else copies[id(b)]) for k, b in buffers.items())
    try:
        yield
    finally:
        for part, buffers in own:
            part._buffers.update(buffers)


class RandomState:
    """Torch's random numbers from now on, on the CPU and a device: dropout draws the same again."""

    def __init__(self, device: torch.device) -> None:
        self._devices = [device] if device.type == "cuda" else []
        self._states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within, the same numbers; after it those that would have come."""
        with torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._states[0])
            for state, device in zip(self._states[1:], self._devices, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def shallow_copy(module: Module) -> Module:
    """A module of the same class and state whose tables of tensors are its own."""
    twin = module.__new__(type(module))
    twin.__dict__ = module.__dict__.copy()
    for table in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[table] = twin.__dict__[table].copy()
    return twin
