"""Memory that one step frees is kept for the next, instead of going back to the system."""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**30  # bytes

# A user who has set one of these wants it so.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep blocks of up to 1 GiB that are freed; False where there is no glibc.

    By default it maps every block above a threshold of 32 MiB at most anew, and gives the free end
    of the heap back; the system then fills the pages with zeros again at each step. On a CPU that
    took up to a third of an outer step, of every method. The process's peak grows by a few per
    cent, and it keeps the peak until it ends.
    """
    if sys.platform != "linux" or any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([mallopt(option, _NEVER) for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)])
