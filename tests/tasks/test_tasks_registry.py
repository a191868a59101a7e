"""Task sets through learn2learn's own door, episodes split, and raw-pixel nearest centroid."""

import l2l_implicit  # noqa: F401, I001  (first: it makes learn2learn importable)

import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import learn2learn
import pytest
import torch

from l2l_implicit.tasks import (
    TASKSETS,
    get_tasksets,
    nearest_centroid_accuracy,
    split_support_query,
)

BENCHMARKS = learn2learn.vision.benchmarks


@pytest.fixture(scope="module")
def tasksets() -> object:
    return BENCHMARKS.get_tasksets("glyphs", train_samples=20, test_ways=3, level="clean")


def test_learn2learn_lists_our_task_sets_and_its_own() -> None:
    names = set(BENCHMARKS.list_tasksets())
    assert set(TASKSETS) == {"glyphs", "caltech101", "folder", "sine"}
    assert names >= {*TASKSETS, "omniglot", "cifarfs", "mini-imagenet"}
    theirs = learn2learn.vision.benchmarks.omniglot_benchmark.omniglot_tasksets
    assert BENCHMARKS._TASKSETS["omniglot"] is theirs


def test_importing_our_tasks_registers_whatever_was_imported_first() -> None:
    code = ("import l2l_implicit.tasks, learn2learn as l2l;"
            "x, y = l2l.vision.benchmarks.get_tasksets('glyphs', level='easy').test.sample();"
            "print(tuple(x.shape), sorted(set(y.tolist())))")  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "(50, 1, 28, 28) [0, 1, 2, 3, 4]"


def test_tasks_have_what_was_asked_for(tasksets: object) -> None:
    for taskset, ways, samples in ((tasksets.train, 5, 20), (tasksets.validation, 3, 10)):
        data, labels = taskset.sample()
        assert data.shape == (ways * samples, 1, 28, 28) and data.dtype == torch.float32
        assert labels.bincount().tolist() == [samples] * ways
        classes = [_classes_of(taskset.dataset.dataset, data[labels == c]) for c in range(ways)]
        assert all(classes) and len(set.union(*classes)) >= ways


def _classes_of(glyphs: object, images: torch.Tensor) -> set[int]:
    """Those that hold all of these images; letters of two scripts may look the same."""
    found = []
    for image in images:
        rows = (glyphs.images == (255 * image).round().byte()).flatten(1).all(1).nonzero()
        found.append({int(glyphs.labels[row]) for row in rows})
    return set.intersection(*found)


def test_a_finite_task_set_repeats_its_tasks() -> None:
    train = get_tasksets("glyphs", num_tasks=3, level="clean").train
    assert len(train) == 3 and torch.equal(train[1][0], train[1][0])


@pytest.mark.parametrize(("name", "options", "error", "message"), [
    ("glyph", {}, ValueError, "got 'glyph'; did you mean 'glyphs'?"),
    ("cifar_fs", {}, ValueError, "did you mean 'cifarfs'?"),
    ("glyphs", {"train_samples": 21}, ValueError,
     "train_samples between 1 and 20, .* got 21: .* at most 20"),
    ("glyphs", {"test_samples": 0}, ValueError, "test_samples between 1 and 23, .* got 0"),
    ("glyphs", {"train_ways": 344}, ValueError,
     "train_ways between 1 and 343, .* got 344: .* at most 343"),
    ("glyphs", {"test_ways": 86}, ValueError,
     "test_ways between 1 and 85, the number of validation .* got 86"),
    ("glyphs", {"train_ways": 2.5}, TypeError, "train_ways: expected a whole number, got 2.5"),
    ("glyphs", {"train_ways": None}, TypeError, "train_ways: expected a whole number, got None"),
    ("glyphs", {"test_samples": 2.5}, TypeError, "test_samples: expected a whole number, got 2.5"),
    ("glyphs", {"levels": "easy"}, TypeError, "got levels='easy': did you mean level?"),
    ("glyphs", {"data_augmentation": "lee2019"}, TypeError, "data_augmentation='lee2019'"),
])  # fmt: skip
def test_what_cannot_be_had(name: str, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        get_tasksets(name, **{"level": "clean", **options} if name == "glyphs" else options)


def test_what_learn2learn_hands_on_for_nothing_is_taken() -> None:
    assert get_tasksets("glyphs", level="clean", data_augmentation=None, root=None).train.sample()


def test_a_task_is_quick(tasksets: object) -> None:
    """Compared with what it cannot do without, the images as floats, on the same machine."""
    images = list((255 * tasksets.validation.sample()[0]).byte())

    def seconds(what: Callable[[], object]) -> float:
        start = time.process_time()
        for _ in range(20):
            what()
        return time.process_time() - start

    def as_floats() -> torch.Tensor:
        return torch.stack([image.float() / 255 for image in images])

    pairs = [(seconds(tasksets.validation.sample), seconds(as_floats)) for _ in range(5)]
    task, least = (min(column) for column in zip(*pairs, strict=True))
    assert task < 20 * least  # 2 to 3 measured; the rest is for other work in between


@pytest.mark.parametrize("seed", range(2))
def test_split_does_not_depend_on_the_order_of_labels(seed: int) -> None:
    labels = torch.arange(4).repeat_interleave(5) * 3
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    data = torch.stack([labels[order].double(), torch.arange(20.0)], 1)
    (xs, ys), (xq, yq) = split_support_query(data, labels[order], shots=2)
    assert ys.tolist() == [0, 0, 3, 3, 6, 6, 9, 9]
    assert yq.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]
    assert torch.equal(xs[:, 0], ys.double()) and torch.equal(xq[:, 0], yq.double())
    positions = torch.cat([xs[:, 1], xq[:, 1]])
    assert positions.sort().values.tolist() == list(range(20))
    for label in (0, 3, 6, 9):  # the first two in the order of the episode are the support
        assert xs[ys == label, 1].max() < xq[yq == label, 1].min()


def test_split_agrees_with_learn2learn_on_its_own_episodes(tasksets: object) -> None:
    data, labels = tasksets.train.sample()
    ours = split_support_query(data, labels, shots=5)
    theirs = learn2learn.data.partition_task(data, labels, shots=5)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])


def test_classes_may_have_unequal_numbers_of_queries() -> None:
    labels = torch.tensor([1, 0, 1, 0, 1])
    _, (_, query) = split_support_query(torch.zeros(5, 2), labels, shots=1)
    assert query.tolist() == [0, 1, 1]


def test_split_refuses_what_it_cannot_split() -> None:
    data, labels = torch.zeros(5, 2), torch.tensor([0, 0, 0, 7, 7])
    with pytest.raises(ValueError, match="more than shots=2 samples .* got 2 of class 7"):
        split_support_query(data, labels, shots=2)
    with pytest.raises(ValueError, match=r"one label for each of 5 inputs, got .*\(4,\)"):
        split_support_query(data, labels[:4], shots=1)
    with pytest.raises(ValueError, match="shots: expected at least 1, got 0"):
        split_support_query(data, labels, shots=0)
    with pytest.raises(TypeError, match="shots: expected a whole number, got 1.5"):
        split_support_query(data, labels, shots=1.5)


class Blobs:
    """Episodes of two classes around 0 and 1; of the query points of class 1 one lies near 0."""

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        data = torch.tensor([0.0, 0.1, 0.2, 0.1, 1.0, 0.9, 1.1, 0.2])[:, None]
        return data, torch.tensor([3, 3, 3, 3, 8, 8, 8, 8])


def test_nearest_centroid_on_a_known_case() -> None:
    assert nearest_centroid_accuracy(Blobs(), 2, 2, 2, num_tasks=5) == (0.75, 0.0)


def test_nearest_centroid_half_width_is_that_of_the_mean(tasksets: object) -> None:
    random.seed(0)
    mean, half_width = nearest_centroid_accuracy(tasksets.train, 5, 5, 15, num_tasks=40)
    assert 0.9 < mean < 0.99 and 0.003 < half_width < 0.03


def test_nearest_centroid_refuses_other_episodes_and_too_few_tasks() -> None:
    with pytest.raises(ValueError, match="shots \\+ queries = 5 .* got 8 samples of 2 classes"):
        nearest_centroid_accuracy(Blobs(), 2, 2, 3)
    with pytest.raises(ValueError, match="num_tasks of at least 2, got 1"):
        nearest_centroid_accuracy(Blobs(), 2, 2, 2, num_tasks=1)
