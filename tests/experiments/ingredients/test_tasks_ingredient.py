"""The configured tasks: sizes, streams, and that old seeds still give the old tasks."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from disk_formats import save

from experiments.ingredients.tasks import make_tasks, tasks
from experiments.training.episodes import Episode, Tasks
from l2l_implicit.tasks.caltech101 import SPLIT

# SHA-256, first 16 digits, of the first two episodes of each stream, as they were at first.
GLYPHS = {
    ("train", 3): ["d71ae9543aeecbad", "146a85aeba159998"],
    ("validation", 0): ["e99aaadec4bf6776", "abc77d8715b75f52"],
    ("test", 0): ["5cf00b3d78c83201", "e3516fe5c20001f0"],
}
SCRIPT = {
    ("train", 3): ["502b9b68a8a59749", "97fe7a9ee8838a5c"],
    ("validation", 0): ["9f828608ec120f80", "4ac0416d8d98a191"],
    ("test", 0): ["5091c2f1d468a69a", "424ff5c9cc4249a6"],
}
CALTECH = {
    ("train", 3): ["84e97cae19e19862", "192a6da92433f85a"],
    ("validation", 0): ["275e0e4d5f8f0882", "f35a5cb15b0de92d"],
    ("test", 0): ["5d24a5052fff165d", "e2eff0bd9e52dad8"],
}


def made(**changes: Any) -> Tasks:
    """The task sets as an experiment makes them."""
    return make_tasks(**{**tasks.configurations[0](), **changes})


def digest(episode: Episode) -> str:
    total = hashlib.sha256()
    for values in episode:
        total.update(values.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def digests(benchmark: Tasks, expected: dict[tuple[str, int], list[str]]) -> dict[Any, list[str]]:
    """The same streams as `expected` has."""
    streams = {key: benchmark.stream(*key) for key in expected}
    return {key: [digest(stream.sample()) for _ in range(2)] for key, stream in streams.items()}


def test_glyphs_are_as_they_were() -> None:
    assert digests(made(), GLYPHS) == GLYPHS
    script = made(split="script", level="easy", ways=3, shots=1, queries=15)
    assert digests(script, SCRIPT) == SCRIPT


def test_caltech101_is_as_it_was(tmp_path: Path) -> None:
    rng = np.random.RandomState(0)
    for name in (name for names in SPLIT.values() for name in names):
        for number in range(1, 5):
            pixels = rng.randint(0, 256, (9, 12, 3)).astype(np.uint8)
            folder = tmp_path / "caltech101" / "101_ObjectCategories" / name
            save(pixels, folder / f"image_{number:04}.jpg")
    benchmark = made(name="caltech101", root=str(tmp_path), size=8, ways=3, shots=2, queries=2)
    assert digests(benchmark, CALTECH) == CALTECH
    large = made(name="caltech101", root=str(tmp_path), size=84, shots=2, queries=2)
    assert large.input_shape() == (3, 84, 84)


def test_training_tasks_do_not_depend_on_the_sizes_of_test_tasks() -> None:
    plain = made(level="easy")
    other = made(level="easy", test_ways=7, test_shots=1, test_queries=3)
    assert other.sizes("train") == plain.sizes("test") == (5, 5, 5)
    assert other.sizes("validation") == other.sizes("test") == (7, 1, 3)
    assert digest(plain.stream("train", 1).sample()) == digest(other.stream("train", 1).sample())
    episode = other.stream("test", 0).sample()
    assert episode.support_targets.tolist() == list(range(7)) and len(episode.inputs) == 28


def test_what_was_resolved_can_be_recorded() -> None:
    noted = made(level="easy", test_shots=1).describe()
    assert json.loads(json.dumps(noted)) == noted
    assert noted["classes"] == {"train": 343, "validation": 85, "test": 108}
    assert noted["samples"]["test"] == 4117 and noted["options"] == {"level": "easy"}
    assert noted["sizes"]["test"] == {"ways": 5, "shots": 1, "queries": 5}
    assert noted["input_shape"] == [1, 28, 28] and noted["kind"] == "classification"


def test_an_unknown_mode_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="got 'val'; did you mean 'validation'"):
        made(level="clean").stream("val", 0)
