"""Torch's kernels of attention, chosen by name."""

from contextlib import AbstractContextManager
from typing import Any

import pytest


def kernel(name: str) -> AbstractContextManager[Any]:
    """Within, attention is computed by this one; torch below 2.3 cannot choose, and is skipped."""
    attention = pytest.importorskip("torch.nn.attention", reason="torch is older than 2.3")
    return attention.sdpa_kernel(getattr(attention.SDPBackend, name))
