"""Strict configuration: a misspelt name or a wrong type stops the run before it starts.

Sacred only warns about most of these. An explicit `key=value` beats a named config, whatever
their order on the command line: that is Sacred's habit, and it is kept.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any

from sacred import Experiment
from sacred.config.utils import undogmatize
from sacred.initialize import (
    create_scaffolding,
    gather_ingredients_topological,
    get_configuration,
    initialize_logging,
)
from sacred.run import Run
from sacred.utils import iterate_flattened

from experiments.tracking.errors import UserError, nearest

Types = Mapping[str, type | UnionType]
"""Declared types of configuration entries, such as {"inner.step": float | None}."""

SEED_LIMIT = 2**32
DESCRIPTION = "__doc__"
"""Sacred hands on a named config's docstring under this name."""


def default_config(experiment: Experiment) -> dict[str, Any]:
    """The nested configuration without any update or named config."""
    scaffolding = create_scaffolding(experiment, gather_ingredients_topological(experiment))
    initialize_logging(experiment, scaffolding)
    for scaffold in scaffolding.values():
        scaffold.gather_fallbacks()
        scaffold.set_up_config()
    return undogmatize(get_configuration(scaffolding))


def check_named_configs(experiment: Experiment, names: Iterable[str]) -> None:
    """Raise UserError for a named config that does not exist (a file's name is accepted)."""
    known = [name for name, _ in experiment.gather_named_configs()]
    for name in names:
        if name not in known and not os.path.isfile(name):
            raise UserError(
                f"no named config {name!r}{nearest(name, known)}"
                " (a value is set as KEY=VALUE, `print_named_configs` lists the names)"
            )


def check_updates(
    defaults: Mapping[str, Any], updates: Mapping[str, Any], types: Types, seeds: Iterable[str]
) -> None:
    """Raise UserError for an update whose type differs from the default's.

    Names unknown here are left to Sacred, which knows the entries that exist only with other
    updates. A default of None accepts anything unless `types` declares the entry.
    """
    for key, value in iterate_flattened(updates):
        if key in seeds:
            _check_seed(key, value)
        elif key in types:
            _check_type(key, value, types[key])
        else:
            _check_like(key, value, _lookup(defaults, key))


def check_run(run: Run, types: Types, seeds: Iterable[str]) -> None:
    """Raise UserError for the entries that Sacred found added or retyped in its new run."""
    changes = run.config_modifications
    added = {key for key in changes.added if not key.endswith(DESCRIPTION)}
    if added:
        key, known = min(added), _names(run.config, seeds) - added
        raise UserError(f"no configuration entry {key!r}{nearest(key, sorted(known))}")
    for key, declared in types.items():
        _check_type(key, _lookup(run.config, key), declared)
    for key, (old, _) in sorted(changes.typechanged.items()):
        value = _lookup(run.config, key)
        if key not in types and old is not type(None) and not _is_a(value, old):
            raise UserError(_mismatch(key, value, old))


def drop_descriptions(config: dict[str, Any]) -> None:
    """Remove, at every depth, the docstrings of named configs from a configuration."""
    config.pop(DESCRIPTION, None)
    for value in config.values():
        if isinstance(value, dict):
            drop_descriptions(value)


def _names(config: Mapping[str, Any], seeds: Iterable[str]) -> set[str]:
    """Every dotted name of the configuration, groups included."""
    keys = [*(key for key, _ in iterate_flattened(config)), *seeds]
    return {key.rsplit(".", depth)[0] for key in keys for depth in range(key.count(".") + 1)}


_MISSING = object()


def _lookup(config: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return _MISSING
        config = config[part]
    return config


def _check_seed(key: str, value: Any) -> None:
    if not _is_a(value, int) or not 0 <= value < SEED_LIMIT:
        raise UserError(f"{key} must be an int from 0 to {SEED_LIMIT - 1}, got {value!r}")


def _check_type(key: str, value: Any, declared: type | UnionType) -> None:
    if value is not _MISSING and not _is_a(value, declared):
        raise UserError(_mismatch(key, value, declared))


def _check_like(key: str, value: Any, default: Any) -> None:
    if default is _MISSING or default is None:
        return
    if not _is_a(value, type(default)):
        raise UserError(_mismatch(key, value, type(default)))
    if isinstance(default, (list, tuple)) and default:
        kinds = {type(item) for item in default}
        for index, item in enumerate(value):
            if len(kinds) == 1 and not _is_a(item, next(iter(kinds))):
                raise UserError(_mismatch(f"{key}[{index}]", item, next(iter(kinds))))


def _is_a(value: Any, wanted: type | UnionType) -> bool:
    """isinstance, with int for float and list for tuple allowed, and bool never a number."""
    members: tuple[Any, ...] = getattr(wanted, "__args__", (wanted,))
    widened = {kind for member in members for kind in _WIDER.get(member, (member,))}
    return type(value) in widened or (
        not isinstance(value, bool) and isinstance(value, tuple(widened))
    )


_WIDER: dict[type, tuple[type, ...]] = {
    float: (float, int),
    list: (list, tuple),
    tuple: (list, tuple),
}


def _mismatch(key: str, value: Any, wanted: type | UnionType) -> str:
    name = getattr(wanted, "__name__", str(wanted))
    return f"{key} must be {name}, got {value!r} ({type(value).__name__})"
