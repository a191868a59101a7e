"""From three data sets to what learn2learn's benchmarks return: (datasets, transforms).

Which task is drawn depends on Python's `random` alone: `NWays`, `KShots` and `RemapLabels` draw
from that module, in this order, and neither numpy's nor torch's generator takes part. So
`random.seed(s)` before sampling repeats the tasks; `torch.manual_seed` and `np.random.seed` do not
change them.
"""

import difflib
import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import learn2learn as l2l

from l2l_implicit import checks
from l2l_implicit.checks import printable
from l2l_implicit.tasks.image_table import ImageTable

# Three MetaDatasets and three lists of transforms (or one callable): train, validation, test.
Benchmark = tuple[tuple[Any, ...], tuple[Any, ...]]
MODES = ("train", "validation", "test")
OPTIONS = ("train_ways", "train_samples", "test_ways", "test_samples", "num_tasks", "root",
           "device")  # of every task set


def build_tasksets(
    tables: Mapping[str, ImageTable],
    train_ways: int, train_samples: int, test_ways: int, test_samples: int,
    also: Sequence[Callable[[Any, Any], Any]] = (),
) -> Benchmark:  # fmt: skip
    """Three `MetaDataset` and three lists of task transforms (train, validation, test).

    Args:
        tables: a data set by mode.
        also: further transforms, called with the `MetaDataset` and the description of a task.
    """
    datasets, transforms = [], []
    for mode in MODES:
        train = mode == "train"
        ways, samples = (train_ways, train_samples) if train else (test_ways, test_samples)
        check_sizes(table := tables[mode], mode, ways, samples, "train" if train else "test")
        dataset = l2l.data.MetaDataset(table, labels_to_indices=table.labels_to_indices)
        datasets.append(dataset)
        transforms.append([
            l2l.data.transforms.NWays(dataset, ways),
            l2l.data.transforms.KShots(dataset, samples),
            l2l.data.transforms.LoadData(dataset),
            l2l.data.transforms.RemapLabels(dataset),
            l2l.data.transforms.ConsecutiveLabels(dataset),
            *(functools.partial(transform, dataset) for transform in also),
        ])
    return tuple(datasets), tuple(transforms)


def check_sizes(table: ImageTable, mode: str, ways: int, samples: int, prefix: str) -> None:
    """Raises ValueError where the table cannot give `ways` classes of `samples` images."""
    checks.count(f"{prefix}_ways", ways)
    checks.count(f"{prefix}_samples", samples)
    available = len(table.classes)
    if not available:
        raise ValueError(f"expected at least {ways} {mode} classes, got none: add classes")
    if ways > available:
        raise ValueError(
            f"expected {prefix}_ways between 1 and {available}, the number of {mode} classes, got "
            f"{ways}: choose {prefix}_ways of at most {available}"
        )
    counts = [len(table.labels_to_indices.get(label, ())) for label in range(available)]
    smallest = min(counts)
    name = printable(table.classes[counts.index(smallest)])
    if not smallest:
        raise ValueError(
            f"expected images in every {mode} class, got none in {name}: give it at least {samples}"
        )
    if samples > smallest:
        raise ValueError(
            f"expected {prefix}_samples between 1 and {smallest}, the images in the smallest "
            f"{mode} class ({name}), got {samples}: choose {prefix}_samples (shots plus queries) "
            f"of at most {smallest}, or give that class more images"
        )


def refuse_unknown(options: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Raises TypeError for an option that is not the task set's `own`; None of another's passes.

    learn2learn's task sets ignore what they do not know, and with it every misspelling.
    """
    known = OPTIONS + own
    for name, value in options.items():
        if name in own or (name in ("data_augmentation", "split_seed") and value is None):
            continue
        near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
        raise TypeError(
            f"expected options of this task set, got {name}={value!r}: did you mean {near[0]}?"
        )


def draw_modes(items: Iterable[Any], shares: Sequence[float], seed: int) -> dict[str, list[Any]]:
    """Items by mode: these shares for validation and test, rounded, and the rest for training."""
    drawn = list(items)
    checks.not_negative("split_seed", seed)  # random drops the sign
    random.Random(seed).shuffle(drawn)
    validation, test = (round(share * len(drawn)) for share in shares)
    train = len(drawn) - validation - test
    parts = drawn[:train], drawn[train : train + validation], drawn[train + validation :]
    return dict(zip(MODES, parts, strict=True))


def describe_tasksets(sets: Any) -> dict[str, Any]:
    """Classes and samples of each mode of a benchmark's task sets, fit for JSON.

    Args:
        sets: learn2learn's named tuple (train, validation, test).

    Returns:
        `{"classes": {mode: count}, "samples": {mode: count}, ...}`; what a data set has to say of
        itself (its attribute `notes`, a dict) comes with it. A data set without classes has 0.

    Example:
        >>> from l2l_implicit.tasks import describe_tasksets, get_tasksets
        >>> describe_tasksets(get_tasksets("glyphs"))["classes"]
        {'train': 343, 'validation': 85, 'test': 108}
    """
    datasets = {mode: getattr(sets, mode).dataset for mode in MODES}
    found: dict[str, Any] = {
        "classes": {mode: len(data.labels_to_indices) for mode, data in datasets.items()},
        "samples": {mode: len(data.indices_to_labels) for mode, data in datasets.items()},
    }
    notes = {mode: getattr(data.dataset, "notes", {}) for mode, data in datasets.items()}
    return found | ({"notes": notes} if any(notes.values()) else {})
