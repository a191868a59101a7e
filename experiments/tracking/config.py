"""Settings are pydantic models: a field is an entry of Sacred's configuration.

Its type and limits are the check, its default is the configuration's, and its comment is what
`print_config` shows. What is wrong is one line: what was expected, what came, what to do. An
explicit `key=value` beats a named config, whatever their order: that is Sacred's habit.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import sacred.commands
import sacred.experiment
import sacred.initialize
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)
from sacred import Experiment
from sacred.config.config_dict import ConfigDict as SacredConfig
from sacred.config.config_summary import ConfigSummary
from sacred.utils import get_by_dotted_path, iterate_flattened, set_by_dotted_path

from experiments.tracking.errors import UserError, nearest, one_line, wrong
from experiments.tracking.whole_file import write_whole

MOST, MOST_GROUPS = 10**9, 20  # of a count; that a name may have
Count = Annotated[int, Field(ge=1, le=MOST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Text = Annotated[str, Field(pattern=r"^[^\x00]*$", min_length=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Values = Mapping[str, Any]
# what stands in [] or (); a set would lose its order, and JSON has none
OfTuple = BeforeValidator(lambda given: list(given) if isinstance(given, tuple) else given)
Counts = Annotated[list[Count], Field(min_length=1), OfTuple]
_AnyList = Annotated[list[Any], OfTuple]

# A field of a model, with the comment above it or behind it.
_FIELD = re.compile(r"((?:^    # .*\n)*)^    (\w+): [^\n]*?(?:  # (.*))?$", re.M)


class Settings(BaseModel):
    """The settings of an ingredient; of an experiment: `RunSettings`.

    A field's comment, behind it or above it, is its documentation. A check of several fields is a
    ``model_validator`` that raises ``ValueError("FIELD: expected ..., got ...; ...")``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @classmethod
    def own_defaults(cls, given: Values, others: Values) -> Values:
        """Defaults that depend on settings that are given, or on those of other ingredients."""
        return {}

    @classmethod
    def defaults(cls, given: Values | None = None, others: Values | None = None) -> dict[str, Any]:
        """Every setting with its default."""
        own = cls.own_defaults(given or {}, others or {})
        return {name: own.get(name, field.get_default(call_default_factory=True))
                for name, field in cls.model_fields.items()}  # fmt: skip

    @classmethod
    def of(cls, given: Values, group: str = "") -> Self:
        """These settings, the others at their defaults.

        UserError: a wrong one, in one line; ``group`` is the ingredient's name.
        """
        given = dict(given)
        try:
            return cls.model_validate({**cls.defaults(given), **given})
        except ValidationError as error:
            raise UserError(cls._line(error, given, f"{group}." if group else "")) from None

    @classmethod
    def read(cls, values: Values) -> Iterable[str]:
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
    def summary(cls, fixed: Values | None = None, preset: Values | None = None,
                fallback: Values | None = None) -> ConfigSummary:  # fmt: skip
        """Defaults and words, as Sacred takes them from a function of its ``@ex.config``."""
        summary = SacredConfig(cls.defaults(fixed, fallback))(fixed, preset, fallback)
        summary.docs = cls.words()
        return summary

    @classmethod
    def _line(cls, error: ValidationError, given: Values, prefix: str) -> str:
        """The first of its errors."""
        first = error.errors(include_url=False)[0]
        if not first["loc"] or first["type"] == "value_error":  # of a check of ours
            return f"{prefix}{first['ctx']['error']}"
        field, value = str(first["loc"][0]), given.get(str(first["loc"][0]))
        if field not in cls.model_fields or (isinstance(value, dict) and value):
            return _unknown(prefix + _leaf(field, value), [prefix + name for name in cls.read({})])
        schema = cls.model_json_schema()["properties"][field]
        words, default = list(map(str, _choices(schema))), cls.defaults(given)[field]
        todo = "leave it out" if default is None else f"try {default!r}"
        if isinstance(value, str) and (near := get_close_matches(value, words, n=1, cutoff=0.3)):
            todo = f"did you mean {near[0]!r}?"
        return f"{prefix}{field}: expected {_expected(schema)}, got {_short(value)}; {todo}"


class RunSettings(Settings):
    """The settings of an experiment."""

    seed: Seed | None = None  # of all random numbers; None: drawn, and recorded


def check_config(experiment: Experiment, config: Values) -> None:
    """Raise UserError for what is wrong in an experiment's whole configuration."""
    rest, groups = dict(config), dict[str, tuple[type[Settings], dict[str, Any]]]()
    for ingredient, _ in list(experiment.traverse_ingredients()):  # an error would break it off
        model = getattr(ingredient, "settings", None)
        group = "" if ingredient is experiment else ingredient.path
        values = dict(rest.pop(group, {})) if group else rest
        if model is None:
            continue
        if "" in values:  # where Sacred puts it
            raise _no_group(group, model, values[""])
        groups[f"{group}." if group else ""] = model, values
        values.pop("__doc__", None)  # of a named config
    known = [prefix + name for prefix, (model, values) in groups.items()
             for name in model.read(values)]  # fmt: skip
    for prefix, (model, values) in groups.items():
        if unknown := values.keys() - model.model_fields.keys():
            name = min(unknown, key=str)
            raise UserError(_unknown(prefix + _leaf(name, values[name]), known))
        model.of(values, prefix.rstrip("."))


def check_groups(experiment: Experiment, updates: Values) -> None:
    """Raise UserError where an ingredient's name has a value, at which Sacred would stumble."""
    for one in experiment.ingredients:
        if not isinstance(value := updates.get(one.path, {}), Mapping):
            raise _no_group(one.path, one.settings, value)


def _no_group(group: str, model: type[Settings], value: Any) -> UserError:
    example = f"set one as {group}.{next(iter(model.model_fields))}=VALUE"
    return wrong(group, "a group of settings", _short(value), example)


def check_named_configs(experiment: Experiment, names: Iterable[str]) -> None:
    """Raise UserError for a named config that there is not, or a file that is not plain data."""
    known = [name for name, _ in experiment.gather_named_configs()]
    for name in names:
        if os.path.isfile(name):
            settings_in(name)
        elif name not in known:
            raise UserError(f"no named config {name!r}{nearest(name, known)}"
                            " (a value is set as KEY=VALUE, `print_named_configs` lists the names)")


def model_of(experiment: Experiment, types: Values) -> type[Settings]:
    """The settings of an experiment whose defaults stand in Sacred's own ``@ex.config``.

    An entry has its default's type, or the one that ``types`` declares by dotted name; None takes
    anything, a dictionary the entries that it has.
    """
    groups = {one.path: one.settings.defaults() for one in experiment.ingredients}
    defaults: dict[str, Any] = {}
    for configuration in experiment.configurations:
        defaults |= configuration(None, defaults, groups)
    defaults.pop("seed", None)
    return _model_like(defaults, types, RunSettings)


def _model_like(
    defaults: Values, types: Values, base: type[Settings] = Settings, group: str = ""
) -> type[Settings]:
    kinds = {list: _AnyList, tuple: _AnyList, bool: bool, int: int, float: float, str: str}
    fields: dict[str, Any] = {}
    for name, value in defaults.items():
        kind = types.get(f"{group}{name}", kinds.get(type(value), Any))
        if isinstance(value, dict) and value and kind is Any:
            inner = _model_like(value, types, group=f"{group}{name}.")
            check = partial(inner.of, group=f"{group}{name}")
            kind = Annotated[dict[str, Any], AfterValidator(check)]
        fields[name] = kind, value
    return create_model("Defaults", __base__=base, **fields)


def nested(updates: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Settings by dotted name as nested ones; of one name the last value counts.

    UserError: a name that cannot be one, or a group with a part that has a value already.
    """
    found: dict[str, Any] = {}
    for name, value in updates:
        _check_names(name, value)
        for leaf, item in iterate_flattened({name: value}):
            try:
                before = get_by_dotted_path(found, leaf, found)  # found: it has no value yet
                set_by_dotted_path(found, leaf, item)
            except TypeError:  # a part of it has a value
                said = f"{_unknown(leaf, ())}, and another word sets a part of it"
                raise UserError(said) from None
            if before is not found and (leaf != name or isinstance(before, dict)):
                raise UserError(f"{leaf} is given twice; give it once")
    return found


def words_as_updates(words: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """The settings, and the named configs, of a command line's ``with``; values are plain data."""
    pairs = [word.partition("=") for word in words or () if word]
    named_configs = [name for name, equals, _ in pairs if not equals]
    return nested((n.strip(), plain_value(v)) for n, eq, v in pairs if eq), named_configs


def plain_value(text: str) -> Any:
    """A Python literal, else the text itself."""
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text.strip()


def settings_in(path: str) -> dict[str, Any]:
    """The settings of a file of plain data, JSON or YAML; UserError for any other, in one line."""
    try:
        read = {".json": partial(json.loads, object_pairs_hook=once_each), ".yaml": _yaml,
                ".yml": _yaml}[Path(path).suffix.lower()]  # fmt: skip
        found = read(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} at the top")
    except (OSError, ValueError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise wrong(path, "settings by name in a file *.json, *.yaml or *.yml",
                    _short(one_line(error)), "`save_config` writes one") from None
    return nested(found.items())


def once_each(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """A mapping as JSON has it; ValueError: a name stands twice in it."""
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} twice")
        found[name] = value
    return found


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        once_each([(str(key.value), value) for key, value in node.value])
        return super().construct_mapping(node, deep)


def _yaml(text: str) -> Any:
    if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
        raise ValueError("an alias")  # a few make a file of any size
    return yaml.load(text, _Loader)


def save_settings(values: Values, path: str) -> None:
    """Write a file that `settings_in` reads; UserError where that cannot be."""
    try:
        write_whole(Path(path), json.dumps(values, indent=2, sort_keys=True).encode())
    except OSError as error:
        raise wrong(path, "to be able to write it", error.strerror, "mend that") from error


# Sacred reads a command line's values, and files of settings, by readers that can run code; it
# writes through links.
sacred.experiment.get_config_updates = words_as_updates
sacred.initialize.load_config_file = settings_in
sacred.commands.save_config_file = save_settings


def _check_names(name: object, value: Any, depth: int = 0) -> None:
    parts = name.split(".") if isinstance(name, str) else [""]
    right = all(part.isidentifier() and not part.startswith("__") for part in parts)
    if not right or depth > MOST_GROUPS:
        raise UserError(_unknown(name, ()))
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        _check_names(key, inner, depth + 1)


def _unknown(name: object, known: Iterable[str]) -> str:
    hint = nearest(str(name), known) or "; `print_config` lists them"
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


def _choices(schema: Values) -> list[Any]:
    """The values that a setting may be, where they are counted out."""
    own = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return [*own, *(choice for one in schema.get("anyOf", ()) for choice in _choices(one))]


def _expected(schema: Values) -> str:
    """A setting's JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(map(_expected, schema["anyOf"]))
    if values := list(map(repr, _choices(schema))):
        return values[0] if len(values) == 1 else "one of " + ", ".join(values)
    if (kind := schema.get("type")) == "array":
        least = " of at least one" if schema.get("minItems") else ""
        return f"a list{least}, each {_expected(schema['items'])}"
    words = {"integer": "a whole number", "number": "a finite number", "string": "text",
             "boolean": "True or False", "null": "None"}  # fmt: skip
    least, most, above = map(schema.get, ("minimum", "maximum", "exclusiveMinimum"))
    limits = "" if above is None else f" above {above:g}"
    if least is not None:
        limits = f" of at least {least:g}" if most is None else f" from {least} to {most}"
    elif most is not None:
        limits = f" of at most {most}"
    return words.get(str(kind), "anything") + limits
