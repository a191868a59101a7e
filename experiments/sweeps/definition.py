"""What a sweep is made of: methods, each with its grid, on benchmarks, for seeds; and one run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, NamedTuple, TypeAlias

from pydantic import ConfigDict, JsonValue, StrictInt
from pydantic.dataclasses import dataclass

from experiments.tracking import UserError
from experiments.tracking.config import nested, plain_value

Settings: TypeAlias = Mapping[str, JsonValue]  # by dotted name, such as {"algorithm.lr": 0.1}
Grid: TypeAlias = tuple[Settings, ...]
# Where things lie: a run is the same run on a machine that keeps them elsewhere.
PLACES = ("tasks.root", "output")
# Of a cell: the words of Sacred's statuses, and pending where there is no run.
STATES = ("completed", "running", "pending", "interrupted", "failed")
COMPLETED, RUNNING, PENDING, INTERRUPTED, FAILED = STATES
STRICT = ConfigDict(extra="forbid")  # a misspelt field would be lost


@dataclass(frozen=True, config=STRICT)
class Method:
    """One row of the table."""

    configs: tuple[str, ...]  # named configs; ``{benchmark}`` stands for the benchmark's `like`
    grid: Grid = ({},)  # the candidates of stage 1; with a single one there is no stage 1
    grids: Mapping[str, Grid] = field(default_factory=dict)  # others, for ``grid=NAME``
    settings: Settings = field(default_factory=dict)  # for all of its runs
    final: Settings = field(default_factory=dict)  # for its runs of stage 2


@dataclass(frozen=True, config=STRICT)
class Benchmark:
    """Where the methods are compared."""

    configs: tuple[str, ...] = ()  # named configs, before the method's
    settings: Settings = field(default_factory=dict)  # for all runs
    like: str = ""  # the benchmark in whose named configs the methods' settings are
    methods: Mapping[str, Settings] = field(default_factory=dict)  # for some methods


class Published(NamedTuple):
    """What a paper prints of a method: test accuracy and its interval in per cent, seconds to 0.90
    of the best validation accuracy (nan: never)."""

    accuracy: float
    half_width: float
    seconds: float


@dataclass(frozen=True, config=STRICT)
class Sweep:
    """Stage 1: each method's grid with seed 0. Stage 2: its best candidate, several seeds.

    The best candidate is the one with the highest final ``validation/accuracy``, the first of
    equals. What is set later in this list wins: `settings`, the benchmark's, the method's, the
    stage's, the method's `final`, the benchmark's for the method, the candidate, the command line.
    """

    methods: Mapping[str, Method]  # by the name that the listing shows
    benchmarks: Mapping[str, Benchmark]  # by what ``benchmark=NAME`` takes; the default is first
    settings: Settings = field(default_factory=dict)  # for all runs
    stage1: Settings = field(default_factory=dict)  # for the grid's runs
    stage2: Settings = field(default_factory=dict)  # for the final runs
    seeds: StrictInt = 3  # of the final runs: 0, 1, ...
    # by benchmark and method, for the report
    published: Mapping[str, Mapping[str, Published]] = field(default_factory=dict)
    module: str = "experiments.train"  # run as ``python -m MODULE with ...``


@dataclass(frozen=True)
class Cell:
    """One run: the experiment, its named configs in their order, all that is set by key."""

    module: str
    configs: tuple[str, ...]
    settings: Settings

    @property
    def identity(self) -> str:
        """A hash of all that was asked for, `PLACES` excepted: ``c`` and 16 hexadecimal digits.

        A folder of one's own images has no name but its place, which is kept.
        The letter keeps Sacred from reading a hash such as 12e45678 as a number.
        """
        own = "folder" in (*self.configs, self.settings.get("tasks.name"))
        kept = {key: _plain(v) for key, v in self.settings.items()
                if key not in PLACES or (own and key == "tasks.root")}  # fmt: skip
        text = json.dumps([self.module, self.configs, kept], sort_keys=True)
        return "c" + hashlib.sha256(text.encode()).hexdigest()[:16]

    def arguments(self) -> list[str]:
        """What follows ``with``; the identity is recorded as the entry ``cell``."""
        set_by_key = [f"{key}={format_value(v)}" for key, v in sorted(self.settings.items())]
        return [*self.configs, *set_by_key, f"cell={self.identity}"]


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """{"lr": 0.1} from ["lr=0.1"]; UserError for another word, or a key that is given twice.

    Nor is a key taken that no setting can have.
    """
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (key and equals):
            raise UserError(f"expected KEY=VALUE, got {word!r}; options start with --")
        if key in settings:
            raise UserError(f"{key} is given twice; give it once")
        settings[key] = plain_value(text)
    nested(settings.items())
    return settings


def format_value(value: Any) -> str:
    """The text that `plain_value` reads back."""
    return value if isinstance(value, str) and plain_value(value) == value else repr(value)


def describe(settings: Settings) -> str:
    """``algorithm.lr=0.1 meta_lr=0.001``."""
    return " ".join(f"{key}={format_value(value)}" for key, value in settings.items())


def _plain(value: Any) -> Any:
    """120.0 and 120 are one setting."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
