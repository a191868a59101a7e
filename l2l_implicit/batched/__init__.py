"""Several tasks at once: one inner loop, one linear solve and one pass of the backbone for all.

For a GPU, where many small operations cost more than a few large ones; on a CPU one task at a
time is as fast or faster.
"""

from l2l_implicit.batched.batch_norm import per_task_batch_norm
from l2l_implicit.batched.diagnostics import BatchedDiagnostics
from l2l_implicit.batched.head import AdaptedHeads, BatchedImplicitHead

__all__ = ["AdaptedHeads", "BatchedDiagnostics", "BatchedImplicitHead", "per_task_batch_norm"]
