"""From three data sets to what learn2learn's benchmarks return: (datasets, transforms).

Which task is drawn depends on Python's `random` alone: `NWays`, `KShots` and `RemapLabels` draw
from that module, in this order, and neither numpy's nor torch's generator takes part. So
`random.seed(s)` before sampling repeats the tasks; `torch.manual_seed` and `np.random.seed` do not
change them.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import learn2learn as l2l

from l2l_implicit.tasks.image_table import ImageTable

Tables = Mapping[str, ImageTable]  # by mode: train, validation, test
# Three MetaDatasets and three lists of transforms: train, validation, test.
Benchmark = tuple[tuple[Any, ...], tuple[list[Any], ...]]
MODES = ("train", "validation", "test")
OPTIONS = ("train_ways", "train_samples", "test_ways", "test_samples", "num_tasks", "root",
           "device")  # of every task set


def build_tasksets(
    tables: Tables, train_ways: int, train_samples: int, test_ways: int, test_samples: int
) -> Benchmark:
    """Three `MetaDataset` and three lists of task transforms (train, validation, test).

    Raises:
        ValueError: a task asks for more classes than a table has, or more images than its
            smallest class holds.
    """
    wanted = {"train": (train_ways, train_samples, "train")}
    wanted |= {mode: (test_ways, test_samples, "test") for mode in MODES[1:]}
    datasets, transforms = [], []
    for mode, (ways, samples, prefix) in wanted.items():
        table = tables[mode]
        check_sizes(table, mode, ways, samples, prefix)
        dataset = l2l.data.MetaDataset(table, labels_to_indices=table.labels_to_indices)
        datasets.append(dataset)
        transforms.append([
            l2l.data.transforms.NWays(dataset, ways),
            l2l.data.transforms.KShots(dataset, samples),
            l2l.data.transforms.LoadData(dataset),
            l2l.data.transforms.RemapLabels(dataset),
            l2l.data.transforms.ConsecutiveLabels(dataset),
        ])
    return tuple(datasets), tuple(transforms)


def check_sizes(table: ImageTable, mode: str, ways: int, samples: int, prefix: str) -> None:
    """Raises ValueError where the table cannot give `ways` classes of `samples` images."""
    available = len(table.labels_to_indices)
    if not 1 <= ways <= available:
        raise ValueError(
            f"expected {prefix}_ways between 1 and {available}, the number of {mode} classes, got "
            f"{ways}: choose {prefix}_ways of at most {available}"
        )
    smallest = min(len(indices) for indices in table.labels_to_indices.values())
    if not 1 <= samples <= smallest:
        raise ValueError(
            f"expected {prefix}_samples between 1 and {smallest}, the images in the smallest "
            f"{mode} class, got {samples}: choose {prefix}_samples (shots plus queries) of at "
            f"most {smallest}"
        )


def refuse_unknown(options: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Raises TypeError for an option that no task set has; `data_augmentation=None` is let pass.

    learn2learn's task sets ignore what they do not know, and with it every misspelling.
    """
    for name, value in options.items():
        if name == "data_augmentation" and value is None:
            continue
        known = OPTIONS + own
        near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
        raise TypeError(
            f"expected options of this task set, got {name}={value!r}: did you mean {near[0]}?"
        )


def nearest_name(value: object, known: tuple[str, ...]) -> str:
    """The known name that is most like `value`, for the remedy of an error."""
    return (difflib.get_close_matches(str(value), known, n=1, cutoff=0) or list(known))[0]


def check_name(kind: str, value: object, known: tuple[str, ...]) -> None:
    """Raises ValueError where `value` is not one of the known names."""
    if value not in known:
        raise ValueError(
            f"expected {kind} to be one of {', '.join(known)}, got {value!r}: did you mean "
            f"{nearest_name(value, known)!r}?"
        )
