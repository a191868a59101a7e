"""Our task sets by name, and their place in learn2learn's own list of benchmarks."""

from collections.abc import Callable
from typing import Any

from learn2learn.vision import benchmarks

from l2l_implicit.tasks.caltech101 import caltech101_tasksets
from l2l_implicit.tasks.glyphs import glyphs_tasksets
from l2l_implicit.tasks.tasksets import Benchmark, check_name

TASKSETS: dict[str, Callable[..., Benchmark]] = {
    "glyphs": glyphs_tasksets,
    "caltech101": caltech101_tasksets,
}


def get_tasksets(name: str, **kwargs: Any) -> Any:
    """Train, validation and test task sets of a benchmark: ours and all of learn2learn's.

    Args:
        name: "glyphs", "caltech101" or a name of `learn2learn.vision.benchmarks.list_tasksets()`.
        kwargs: as of `learn2learn.vision.benchmarks.get_tasksets` (`train_ways`, `train_samples`,
            `num_tasks`, `root`, `device`, ...) and the benchmark's own.

    Returns:
        learn2learn's named tuple (train, validation, test); `.train.sample()` is (data, labels).

    Raises:
        ValueError: an unknown name.

    Example:
        >>> data, labels = get_tasksets("glyphs", train_samples=20).train.sample()
        >>> data.shape
        torch.Size([100, 1, 28, 28])
    """
    check_name("name", name, tuple(benchmarks.list_tasksets()))
    return benchmarks.get_tasksets(name, **kwargs)


def register() -> None:
    """Adds our task sets to `learn2learn.vision.benchmarks`; `import l2l_implicit.tasks` does it.

    learn2learn has no public way to add one: its list is the private dict `_TASKSETS`.
    """
    benchmarks._TASKSETS.update(TASKSETS)
