"""Our task sets by name, and their place in learn2learn's own list of benchmarks."""

from collections.abc import Callable
from typing import Any

import learn2learn as l2l
from learn2learn.vision import benchmarks

from l2l_implicit import checks
from l2l_implicit.tasks.caltech101 import caltech101_tasksets
from l2l_implicit.tasks.folder import folder_tasksets
from l2l_implicit.tasks.glyphs import glyphs_tasksets
from l2l_implicit.tasks.learn2learn_benchmarks import LEARN2LEARN
from l2l_implicit.tasks.sine import sine_tasksets
from l2l_implicit.tasks.tasksets import Benchmark

TASKSETS: dict[str, Callable[..., Benchmark]] = {
    "glyphs": glyphs_tasksets,
    "caltech101": caltech101_tasksets,
    "folder": folder_tasksets,
    "sine": sine_tasksets,
}
"""Our task sets by name; a value makes (datasets, transforms), as learn2learn's benchmarks do."""
ALIASES = {
    "cifar-fs": "cifarfs",
    "mini-imagenet": "mini_imagenet",
    "tiered-imagenet": "tiered_imagenet",
}


def get_tasksets(name: str, num_tasks: int = -1, **kwargs: Any) -> Any:
    """Train, validation and test task sets of a benchmark: ours, or learn2learn's repaired.

    Args:
        name: "glyphs", "caltech101", "folder", "sine", "cifarfs", "fc100", "mini_imagenet",
            "tiered_imagenet", "omniglot", or any other name that
            `learn2learn.vision.benchmarks.list_tasksets()` has.
        num_tasks: tasks of each set, which then repeat; -1 draws new ones without end.
        kwargs: as of `learn2learn.vision.benchmarks.get_tasksets`: `train_ways` and `test_ways`,
            classes of a task (test: also of validation tasks), 5; `train_samples` and
            `test_samples`, images of a class in a task, shots plus queries, 10; `root`, where
            data lies; `device`, where images live, None for the CPU. Then the benchmark's own,
            and nothing else; `data_augmentation=None` is accepted as learn2learn's callers pass it.

    Returns:
        learn2learn's named tuple (train, validation, test); `.train.sample()` is (data, labels).

    Raises:
        ValueError: an unknown name; more ways or samples than there are.
        TypeError: an unknown option.

    Example:
        >>> data, labels = get_tasksets("glyphs", train_samples=20).train.sample()
        >>> data.shape
        torch.Size([100, 1, 28, 28])
    """
    listed = (*benchmarks.list_tasksets(), *LEARN2LEARN, *ALIASES)
    checks.choice("name", name, dict.fromkeys(listed))
    name = canonical(name)
    if kwargs.get("root", "") is None:
        del kwargs["root"]
    if name not in LEARN2LEARN:
        return benchmarks.get_tasksets(name, num_tasks=num_tasks, **kwargs)
    datasets, transforms = LEARN2LEARN[name](**kwargs)
    sets = (
        l2l.data.Taskset(dataset, task_transforms=steps, num_tasks=num_tasks)
        for dataset, steps in zip(datasets, transforms, strict=True)
    )
    return benchmarks.BenchmarkTasksets(*sets)


def canonical(name: str) -> str:
    """Our name of a benchmark: learn2learn's "mini-imagenet" is "mini_imagenet" here.

    Example:
        >>> canonical("cifar-fs"), canonical("glyphs")
        ('cifarfs', 'glyphs')
    """
    return ALIASES.get(name, name)


def kind_of(name: str) -> str:
    """What its targets are: "regression" where they are numbers, else "classification".

    Example:
        >>> kind_of("sine"), kind_of("glyphs")
        ('regression', 'classification')
    """
    return "regression" if name == "sine" else "classification"


def register() -> None:
    """Adds our task sets to `learn2learn.vision.benchmarks`; `import l2l_implicit.tasks` does it.

    learn2learn has no public way to add one: its list is the private dict `_TASKSETS`. What it
    lists itself stays as it is; `get_tasksets` of this package is the door to the repaired ones.

    Example:
        >>> import l2l_implicit.tasks
        >>> from learn2learn.vision.benchmarks import list_tasksets
        >>> "glyphs" in list_tasksets()
        True
    """
    benchmarks._TASKSETS.update(TASKSETS)
