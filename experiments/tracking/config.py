"""Settings are pydantic models: a field is an entry of Sacred's configuration.

Its type and limits are the check, its default is the configuration's, and its comment is what
`print_config` shows. What is wrong is one line: what was expected, what came, what to do. An
explicit `key=value` beats a named config, whatever their order on the command line: that is
Sacred's habit, and it is kept.

Example:
    >>> from experiments.tracking.config import Count, Settings
    >>> class Model(Settings):
    ...     hidden: Count = 32
    >>> Model.of({"hidden": 0}, "model")
    Traceback (most recent call last):
    experiments.tracking.errors.UserError: model.hidden: expected a whole number from 1 to \
1000000000, got 0; try 32
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import sacred.experiment
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import CoreSchema, core_schema
from sacred import Experiment
from sacred.config import config_files
from sacred.config.config_dict import ConfigDict as SacredConfig
from sacred.config.config_summary import ConfigSummary
from sacred.utils import iterate_flattened, set_by_dotted_path
from typing_extensions import Self

from experiments.tracking.errors import UserError, nearest, one_line

MOST = 10**9
MOST_GROUPS = 20  # that a name may have
Count = Annotated[int, Field(ge=1, le=MOST)]
Counts = Annotated[list[Count], Field(strict=False, min_length=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$", min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class OneOf:
    """Names that come from a table: ``Annotated[str, OneOf(TABLE)]``."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(self._names)


class Settings(BaseModel):
    """The settings of an ingredient; of an experiment: `RunSettings`.

    A field's comment, behind it or above it, is its documentation. A check of several fields is a
    ``model_validator`` that raises ``ValueError("FIELD: expected ..., got ...; ...")``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @classmethod
    def own_defaults(cls, given: Mapping[str, Any], others: Mapping[str, Any]) -> Mapping[str, Any]:
        """Defaults that depend on settings that are given, or on those of other ingredients."""
        return {}

    @classmethod
    def defaults(
        cls, given: Mapping[str, Any] | None = None, others: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every setting with its default."""
        own = cls.own_defaults(given or {}, others or {})
        fields = cls.model_fields.items()
        return {name: own[name] if name in own else field.get_default(call_default_factory=True)
                for name, field in fields}  # fmt: skip

    @classmethod
    def of(cls, given: Mapping[str, Any], group: str = "") -> Self:
        """These settings, the others at their defaults.

        Raises:
            UserError: a wrong one, in one line; ``group`` is the ingredient's name.
        """
        given = dict(given)
        try:
            return cls.model_validate({**cls.defaults(given), **given})
        except ValidationError as error:
            raise UserError(cls._line(error, given, group)) from None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Iterable[str]:
        """The settings that are read, beside ``values``: those that a hint may name."""
        return cls.model_fields

    @classmethod
    def words(cls) -> dict[str, str]:
        """The comment of every field."""
        models = [model for model in reversed(cls.__mro__) if issubclass(model, Settings)]
        lines = _FIELD.findall("".join(map(inspect.getsource, models)))
        found = {name: behind or " ".join(above.replace("#", " ").split())
                 for above, name, behind in lines}  # fmt: skip
        return {name: words for name, words in found.items() if name in cls.model_fields and words}

    @classmethod
    def _line(cls, error: ValidationError, given: Mapping[str, Any], group: str) -> str:
        """The first of its errors."""
        prefix, first = f"{group}." if group else "", error.errors(include_url=False)[0]
        if not first["loc"]:
            return f"{prefix}{first.get('ctx', {}).get('error', first['msg'])}"
        field, value = str(first["loc"][0]), given.get(str(first["loc"][0]))
        if field not in cls.model_fields or (isinstance(value, dict) and value):
            known = [f"{prefix}{name}" for name in cls.read({})]
            return _unknown(f"{prefix}{_leaf(field, value)}", known)
        schema = cls.model_json_schema()["properties"][field]
        choices, default = _choices(schema), cls.defaults(given)[field]
        near = get_close_matches(str(value), map(str, choices), n=1, cutoff=0.3)
        todo = "leave it out" if default is None else f"try {default!r}"
        todo = f"did you mean {near[0]!r}?" if near and isinstance(value, str) else todo
        return f"{prefix}{field}: expected {_expected(schema)}, got {_short(value)}; {todo}"


class RunSettings(Settings):
    """The settings of an experiment."""

    seed: Seed | None = None  # of all random numbers; None: drawn, and recorded


# A field of a model, with the comment above it or behind it.
_FIELD = re.compile(r"((?:^    # .*\n)*)^    (\w+): [^\n]*?(?:  # (.*))?$", re.M)


class ModelConfig:
    """A model's defaults and words, as Sacred takes them from a function of its ``@ex.config``."""

    def __init__(self, model: type[Settings]) -> None:
        self._model, self._words = model, model.words()

    def __call__(self, fixed: Mapping[str, Any] | None = None,
                 preset: Mapping[str, Any] | None = None,
                 fallback: Mapping[str, Any] | None = None) -> ConfigSummary:
        summary = SacredConfig(self._model.defaults(fixed, fallback))(fixed, preset, fallback)
        summary.docs = self._words
        return summary


def check_config(experiment: Experiment, config: dict[str, Any]) -> None:
    """Raise UserError for what is wrong in an experiment's whole configuration."""
    groups: dict[str, tuple[type[Settings], dict[str, Any]]] = {}
    for ingredient, _ in list(experiment.traverse_ingredients()):  # an error would break it off
        group = "" if ingredient is experiment else ingredient.path
        values = dict(config if ingredient is experiment else config.get(group, {}))
        if "" in values:  # where Sacred puts it
            raise UserError(
                f"{group}: expected a group of settings, got {_short(values[''])}; set one as "
                f"{group}.{next(iter(ingredient.settings.model_fields))}=VALUE"
            )
        values.pop("__doc__", None)  # of a named config
        groups[group] = ingredient.settings, values
    for group in groups.keys() - {""}:
        groups[""][1].pop(group, None)
    prefixes = {group: f"{group}." if group else "" for group in groups}
    known = [
        prefixes[group] + name
        for group, (model, values) in groups.items() for name in model.read(values)
    ]  # fmt: skip
    for group, (model, values) in groups.items():
        for name in sorted(values.keys() - model.model_fields.keys(), key=str):
            raise UserError(_unknown(prefixes[group] + _leaf(name, values[name]), known))
    for group, (model, values) in groups.items():
        model.of(values, group)


def check_named_configs(experiment: Experiment, names: Iterable[str]) -> None:
    """Raise UserError for a named config that does not exist, or a file that is not plain JSON."""
    known = [name for name, _ in experiment.gather_named_configs()]
    for name in names:
        if os.path.isfile(name):
            _check_plain_file(name)
        elif name not in known:
            raise UserError(
                f"no named config {name!r}{nearest(name, known)}"
                " (a value is set as KEY=VALUE, `print_named_configs` lists the names)"
            )


def nested(updates: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Settings by dotted name as nested ones.

    Raises:
        UserError: a name that cannot be one, in one line.
    """
    found: dict[str, Any] = {}
    for name, value in updates:
        _check_names(name, value)
        try:
            set_by_dotted_path(found, name, value)
        except TypeError:  # a part of it has a value
            raise UserError(f"{_unknown(name, ())}, and another word sets a part of it") from None
    return found


def words_as_updates(words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings, and the named configs, of a command line's ``with``; values are plain data.

    Raises:
        UserError: a name that cannot be one, in one line.
    """
    pairs = [word.partition("=") for word in words or () if word]
    named_configs = [name for name, equals, _ in pairs if not equals]
    return nested((n.strip(), plain_value(v)) for n, eq, v in pairs if eq), named_configs


# Sacred reads a command line's values, and files of settings, by readers that can run code.
sacred.experiment.get_config_updates = words_as_updates
config_files.HANDLER_BY_EXT[".json"].load = json.load
for _extension in [name for name in config_files.HANDLER_BY_EXT if name != ".json"]:
    del config_files.HANDLER_BY_EXT[_extension]


def plain_value(text: str) -> Any:
    """The number, list, ... that a word of a command line writes; else the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text.strip()


def _check_plain_file(path: str) -> None:
    """Raise UserError unless the file holds settings as plain JSON."""
    try:
        if not path.endswith(".json"):
            raise ValueError("another kind of file")
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} at the top")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected settings as a JSON object in a file named *.json, got "
            f"{_short(one_line(error))}; `save_config` writes one"
        ) from None
    nested(found.items())


def _check_names(name: object, value: Any, depth: int = 0) -> None:
    parts = name.split(".") if isinstance(name, str) else [""]
    right = all(part.isidentifier() and not part.startswith("__") for part in parts)
    if not right or depth > MOST_GROUPS:
        raise UserError(_unknown(name, ()))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_names(key, inner, depth + 1)


def _unknown(name: object, known: Iterable[str]) -> str:
    hint = nearest(str(name), list(known)) or "; `print_config` lists them"
    return f"no configuration entry {_short(name)}{hint}"


def _leaf(name: object, value: Any) -> str:
    """The dotted name of the first entry below an unknown one."""
    below = next(iterate_flattened(value), None) if isinstance(value, dict) else None
    return f"{name}" if below is None else f"{name}.{below[0]}"


def _short(value: Any) -> str:
    """Its `repr`, on one line of a readable length."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    """The values that a setting may be, where they are listed."""
    own = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return [*own, *(choice for one in schema.get("anyOf", ()) for choice in _choices(one))]


def _expected(schema: Mapping[str, Any]) -> str:
    """A setting's JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(map(_expected, schema["anyOf"]))
    if values := _choices(schema):
        return ("one of " if len(values) > 1 else "") + ", ".join(map(repr, values))
    if schema.get("type") == "array":
        least = " of at least one" if schema.get("minItems") else ""
        return f"a list{least}, each {_expected(schema['items'])}"
    words = {"integer": "a whole number", "number": "a finite number", "null": "None",
             "boolean": "True or False", "string": "text"}  # fmt: skip
    return words.get(str(schema.get("type")), "another value") + _limits(schema)


def _limits(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minimum"), schema.get("maximum", schema.get("exclusiveMaximum"))
    if most is not None:
        most -= "exclusiveMaximum" in schema
        return f" of at most {most}" if least is None else f" from {least} to {most}"
    if "exclusiveMinimum" in schema:
        return f" above {schema['exclusiveMinimum']:g}"
    return "" if least is None else f" of at least {least:g}"
