"""Which few-shot tasks: data set, ways, shots, queries, for training and for testing."""

# ruff: noqa: F841  (Sacred reads a config function's local variables)

from __future__ import annotations

from experiments.tracking import TrackedIngredient, UserError
from experiments.training.episodes import Sizes, Tasks
from l2l_implicit.tasks import get_tasksets

tasks = TrackedIngredient("tasks")
TYPES = {
    "test_ways": int | None,
    "test_shots": int | None,
    "test_queries": int | None,
    "split": str | None,
    "level": str | None,
    "size": int | None,
    "split_seed": int | None,
    "augmentation": str | None,
}


@tasks.config
def defaults() -> None:
    name = "glyphs"  # data set
    ways = 5  # classes a task
    shots = 5  # support images a class
    queries = 5  # query images a class
    test_ways = None  # of validation and test tasks; None: as in training
    test_shots = None
    test_queries = None
    root = "~/data"  # folder of the data sets that are not embedded
    split = None  # glyphs: random or script
    level = None  # glyphs: clean, easy, medium or hard
    size = None  # caltech101, folder: pixels
    split_seed = None  # omniglot, folder: seed of the split into training, validation and test
    augmentation = None  # mini_imagenet, tiered_imagenet: normalize
    skip_unreadable = False  # folder: leave out images that cannot be read, and count them


@tasks.capture
def make_tasks(
    name: str,
    ways: int,
    shots: int,
    queries: int,
    test_ways: int | None,
    test_shots: int | None,
    test_queries: int | None,
    root: str,
    split: str | None,
    level: str | None,
    size: int | None,
    split_seed: int | None,
    augmentation: str | None,
    skip_unreadable: bool,
) -> Tasks:
    """The configured task sets.

    Raises:
        UserError: what the data set cannot give, in one line.
    """
    train = _checked("", Sizes(ways, shots, queries))
    asked = (test_ways, test_shots, test_queries)
    same = (usual if own is None else own for own, usual in zip(asked, train, strict=True))
    test = _checked("test_", Sizes(*same))
    given = {
        "split": split,
        "level": level,
        "size": size,
        "split_seed": split_seed,
        "data_augmentation": augmentation,
        "skip_unreadable": skip_unreadable or None,
    }
    options = {key: value for key, value in given.items() if value is not None}
    try:
        sets = get_tasksets(
            name,
            train_ways=train.ways,
            train_samples=train.shots + train.queries,
            test_ways=test.ways,
            test_samples=test.shots + test.queries,
            root=root,
            **options,
        )
        return Tasks(sets, name, train, test, options)
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"tasks.name={name}: {error}") from error


def _checked(prefix: str, sizes: Sizes) -> Sizes:
    for (key, value), least in zip(sizes._asdict().items(), (2, 1, 1), strict=True):
        if value < least:
            raise UserError(f"tasks.{prefix}{key}: expected at least {least}, got {value}; try 5")
    return sizes
