"""Which modules let the images of a batch depend on each other in a way not known here."""

from __future__ import annotations

import torch.nn.utils.parametrizations as parametrizations
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from l2l_implicit.batched.drop_block import DropBlock
from l2l_implicit.chunked import Chunked

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def find_coupling(backbone: nn.Module) -> None:
    """Refuse modules that would mix the tasks of one pass, or leave another state than T passes.

    Known are torch's own; a module of the user's own that mixes images is not noticed.

    Raises:
        ValueError: there is one.
    """
    for name, module in backbone.named_modules():
        why = _coupling(module)
        if why is not None:
            raise ValueError(
                f"{name or 'backbone'}: expected modules that treat images one by one, and torch's "
                f"BatchNorm1d, 2d, 3d, got {type(module).__name__}, {why}; run one task at a time"
            )


def _coupling(module: nn.Module) -> str | None:
    """Why ``module`` couples the tasks, or None."""
    if isinstance(module, _BatchNorm) and type(module) not in _PLAIN:
        return "whose forward is not known here"
    if "batchnorm" in _bare_name(module) and type(module) not in _PLAIN:
        return "which is called a batch norm"
    if "dropblock" in _bare_name(module) and type(module) is not DropBlock and module.training:
        return "whose scale may be that of the whole batch"
    if isinstance(module, Chunked):
        return "whose second pass comes later"
    if isinstance(module, _InstanceNorm) and module.track_running_stats and module.training:
        return "whose running statistics are averaged over the batch"
    spectral = getattr(parametrizations, "_SpectralNorm", ())
    hooks = module._forward_pre_hooks.values()
    if isinstance(module, spectral) or any(isinstance(hook, SpectralNorm) for hook in hooks):
        return "whose spectral norm advances at every pass" if module.training else None
    return None


def _bare_name(module: nn.Module) -> str:
    return type(module).__name__.lower().replace("_", "")
