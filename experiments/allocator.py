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
    """Tell glibc to hold on to what is freed, up to 1 GiB at a time; False where it is not there.

    By default each activation of more than 32 MiB at the most is mapped anew, and the system fills
    its pages with zeros: on a CPU up to a third of an outer step, for every method. What a process
    takes at its peak is the same; it takes it until it ends.
    """
    if sys.platform != "linux" or any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return all([mallopt(option, _NEVER) for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD)])
