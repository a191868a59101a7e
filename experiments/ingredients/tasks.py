"""Which few-shot tasks: data set, ways, shots, queries, for training and for testing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from experiments.tracking import TrackedIngredient, UserError, wrong
from experiments.tracking.config import Settings, Text, Values
from experiments.training.episodes import Sizes, Tasks
from l2l_implicit.tasks import canonical, get_tasksets
from l2l_implicit.tasks.learn2learn_benchmarks import AUGMENTATIONS
from l2l_implicit.tasks.registry import LEARN2LEARN, TASKSETS

MOST_SAMPLES = 1_000_000  # of a class in a task
Ways = Annotated[int, Field(ge=2, le=MOST_SAMPLES)]
Samples = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]


def of(*names: str, default: Any = None, **options: Any) -> Any:
    """A setting that these data sets alone have."""
    return Field(default=default, json_schema_extra={"of": list(names)}, **options)


class TaskSettings(Settings):
    """The settings of this ingredient."""

    name: Text = "glyphs"  # data set
    ways: Ways = 5  # classes a task
    shots: Samples = 5  # support images a class
    queries: Samples = 5  # query images a class
    test_ways: Ways | None = None  # of validation and test tasks; None: as in training
    test_shots: Samples | None = None  # of validation and test tasks; None: as in training
    test_queries: Samples | None = None  # of validation and test tasks; None: as in training
    root: Text = "~/data"  # folder of the data sets that are not embedded
    split: Text | None = of("glyphs")  # glyphs: random or script
    level: Text | None = of("glyphs")  # glyphs: clean, easy, medium or hard
    # caltech101, folder: pixels of a side
    size: Annotated[int, Field(le=10_000)] | None = of("caltech101", "folder")
    # omniglot, folder: seed of the split into training, validation and test
    split_seed: int | None = of("omniglot", "folder")
    # of training images: lee2019 (mini_imagenet, tiered_imagenet: also normalize)
    augmentation: Text | None = of(*AUGMENTATIONS, serialization_alias="data_augmentation")
    # folder: leave out images that cannot be read, and count them
    skip_unreadable: bool = of("folder", default=False)

    @classmethod
    def read(cls, values: Values) -> list[str]:
        return [key for key in cls.model_fields if cls._has(str(values.get("name")), key)]

    @classmethod
    def _has(cls, name: str, key: str) -> bool:
        """An unknown data set has all: it is its name that the user has to hear of."""
        extra, name = cls.model_fields[key].json_schema_extra, canonical(name)
        known = name in TASKSETS or name in LEARN2LEARN
        return not known or not isinstance(extra, dict) or name in extra["of"]

    @model_validator(mode="after")
    def _of_this_data_set(self) -> TaskSettings:
        for key, value in self:
            if value is not None and value is not False and not self._has(self.name, key):
                raise wrong(f"name={self.name}", f"no setting tasks.{key}", f"{key}={value!r}")
        return self


tasks = TrackedIngredient("tasks", settings=TaskSettings)
SIZES = {"name", "root", "ways", "shots", "queries", "test_ways", "test_shots", "test_queries"}
# Settings in the words of `get_tasksets`.
WORDS = {"train_ways": "tasks.ways", "test_ways": "tasks.test_ways",
         "train_samples": "tasks.shots + tasks.queries",
         "test_samples": "tasks.test_shots + tasks.test_queries"}  # fmt: skip


def make_tasks(**settings: Any) -> Tasks:
    """The task sets that these settings name; UserError: what the data set cannot give."""
    s = TaskSettings.of(settings, "tasks")
    train = Sizes(s.ways, s.shots, s.queries)
    asked = (s.test_ways, s.test_shots, s.test_queries)
    test = Sizes(*(usual if a is None else a for a, usual in zip(asked, train, strict=True)))
    options = s.model_dump(exclude=SIZES, exclude_defaults=True, by_alias=True)
    samples = {"train_samples": s.shots + s.queries, "test_samples": test.shots + test.queries}
    try:
        sets = get_tasksets(s.name, train_ways=train.ways, test_ways=test.ways, root=s.root,
                            **samples, **options)  # fmt: skip
        return Tasks(sets, s.name, train, test, options)
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        text = str(error) or type(error).__name__
        words = [f"{word}: {ours}" for word, ours in WORDS.items() if word in text]
        more = f" ({', '.join(words)})" if words else ""
        raise UserError(f"tasks.name={s.name}: {text}{more}") from error
