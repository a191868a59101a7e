"""Task sets through learn2learn's own door, episodes split, and raw-pixel nearest centroid."""

import l2l_implicit  # noqa: F401, I001  (first: it makes learn2learn importable)

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import learn2learn
import pytest
import torch
from warm_process import run

from l2l_implicit.tasks import get_tasksets, nearest_centroid_accuracy, split_support_query

BENCHMARKS = learn2learn.vision.benchmarks


@pytest.fixture(scope="module")
def tasksets() -> object:
    return BENCHMARKS.get_tasksets("glyphs", train_samples=20, test_ways=3, level="clean")


def test_importing_our_tasks_registers_them_whatever_was_imported_first() -> None:
    """And learn2learn's own stay."""
    code = ("import l2l_implicit.tasks, learn2learn as l2l; of = l2l.vision.benchmarks;"
            "x, y = of.get_tasksets('glyphs', level='easy').test.sample();"
            "print(tuple(x.shape), sorted(set(y.tolist())));"
            "ours = l2l_implicit.tasks.TASKSETS;"
            "print({*ours, 'cifarfs', 'mini-imagenet'} - set(of.list_tasksets()), sorted(ours));"
            "print(of._TASKSETS['omniglot'] is of.omniglot_benchmark.omniglot_tasksets)")
    assert run(["-c", code], Path.cwd()).stdout.splitlines()[-3:] == [
        "(50, 1, 28, 28) [0, 1, 2, 3, 4]", "set() ['caltech101', 'folder', 'glyphs', 'sine']",
        "True",
    ]  # fmt: skip


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
    ("glyphs", {"train_ways": 344}, ValueError,
     "train_ways between 1 and 343, .* got 344: .* at most 343"),
    ("glyphs", {"test_ways": 86}, ValueError,
     "test_ways between 1 and 85, the number of validation .* got 86"),
    ("glyphs", {"train_ways": 2.5}, TypeError, "train_ways: expected a whole number, got 2.5"),
    ("sine", {"test_samples": 2.5}, TypeError, "test_samples: expected a whole number, got 2.5"),
    ("glyphs", {"levels": "easy"}, TypeError, "got levels='easy': did you mean level?"),
    ("glyphs", {"data_augmentation": "lee2019"}, TypeError, "data_augmentation='lee2019'"),
])  # fmt: skip
def test_what_cannot_be_had(name: str, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        get_tasksets(name, **{"level": "clean", **options} if name == "glyphs" else options)


def test_split_does_not_depend_on_the_order_of_labels() -> None:
    labels = torch.arange(4).repeat_interleave(5) * 3
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
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


@pytest.mark.parametrize("labels, shots, message", [
    ([0, 0, 0, 7, 7], 2, "more than shots=2 samples .* got 2 of class 7"),
    ([0, 0, 0, 7], 1, r"one label for each of 5 inputs, got .*\(4,\)"),
    ([0, 0, 0, 7, 7], 0, "shots: expected at least 1, got 0"),
])  # fmt: skip
def test_split_refuses_what_it_cannot_split(labels: list[int], shots: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_support_query(torch.zeros(5, 2), torch.tensor(labels), shots=shots)


def test_nearest_centroid_on_a_known_case_and_on_others() -> None:
    """Two classes around 0 and 1; of the query points of class 1 one lies near 0."""
    data = torch.tensor([0.0, 0.1, 0.2, 0.1, 1.0, 0.9, 1.1, 0.2])[:, None]
    blobs = SimpleNamespace(sample=lambda: (data, torch.tensor([3, 3, 3, 3, 8, 8, 8, 8])))
    assert nearest_centroid_accuracy(blobs, 2, 2, 2, num_tasks=5) == (0.75, 0.0)
    with pytest.raises(ValueError, match="shots \\+ queries = 5 .* got 8 samples of 2 classes"):
        nearest_centroid_accuracy(blobs, 2, 2, 3)
    with pytest.raises(ValueError, match="num_tasks of at least 2, got 1"):
        nearest_centroid_accuracy(blobs, 2, 2, 2, num_tasks=1)


def test_nearest_centroid_half_width_is_that_of_the_mean(tasksets: object) -> None:
    random.seed(0)
    mean, half_width = nearest_centroid_accuracy(tasksets.train, 5, 5, 15, num_tasks=40)
    assert 0.9 < mean < 0.99 and 0.003 < half_width < 0.03
