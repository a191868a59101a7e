"""The peak of live tensor memory (CUDA's own counter there, a count of storages on a CPU), and
memory that one step frees and the next one uses."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of every storage that an operation returns, until it is freed.

    What lives inside one operation (its workspace) is not seen, on any device's counter neither.

    Attributes:
        live: bytes alive that were allocated since the beginning.
        peak: the largest ``live``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None
                           ) -> Any:  # fmt: skip
        given = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in given:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes of tensors that ``function`` has alive at once, at most, beyond those it finds."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveStorages() as storages:
        function()
    return storages.peak


def process_peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _NEVER = -1, -3, 2**30  # glibc's malloc.h; bytes
# A user who has set one of these wants it so.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep blocks of up to 1 GiB that are freed; False where there is no glibc.

    By default it maps every block above a threshold of 32 MiB at most anew, and gives the free end
    of the heap back; the system then fills the pages with zeros again at each step, which took up
    to a third of an outer step. The process's peak grows by a few per cent, and stays.
    """
    if sys.platform != "linux" or any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([mallopt(option, _NEVER) for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)])
