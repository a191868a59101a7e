"""A module as a first pass found it, put back for a second pass that computes the same again."""

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm


def moves_with_each_pass(module: nn.Module) -> bool:
    """Whether a module is spectral norm in training mode, whose every pass is another function."""
    hooks = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    return module.training and (hooks or type(module).__name__ == "_SpectralNorm")


class Tables(NamedTuple):
    """One module's parameters, buffers and plain numbers (its mode, counters, rates)."""

    parameters: dict[str, Any]
    buffers: dict[str, Any]
    numbers: dict[str, Any]


def _tables(module: nn.Module) -> Tables:
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float)}
    return Tables(dict(module._parameters), dict(module._buffers), numbers)


def _install(module: nn.Module, tables: Tables) -> None:
    vars(module).update(tables.numbers, _parameters=tables.parameters, _buffers=tables.buffers)


class FirstPass:
    """A context that takes note of how a module is before it.

    Buffers are copied, since a pass may write into them (running statistics). No copy is kept of
    those that it did not write into, as far as that is known: torch's batch norm does not say so.

    Args:
        module: what runs.
        given: its input.
    """

    def __init__(self, module: nn.Module, given: Tensor) -> None:
        self._named, self._given = list(module.named_modules()), given

    def __enter__(self) -> None:
        self._tables = [_tables(module) for module in self.modules]
        self._written = [_copies(tables.buffers) for tables in self._tables]
        self._versions = self._present_versions()
        self._buffer_versions = [_versions(tables.buffers) for tables in self._tables]

    def __exit__(self, *error: object) -> None:
        records = zip(self._tables, self._written, self._buffer_versions, strict=True)
        for tables, copies, before in records:
            now = _versions(tables.buffers)
            if not tables.numbers.get("training", True):
                for name in [name for name in now if now[name] == before[name]]:
                    del copies[name]

    @property
    def modules(self) -> list[nn.Module]:
        """The module and all below it."""
        return [module for _, module in self._named]

    def tables(self) -> list[Tables]:
        """What each of `modules` held before the pass; written buffers as fresh copies."""
        pairs = zip(self._tables, self._written, strict=True)
        return [t._replace(buffers={**t.buffers, **_copies(written)}) for t, written in pairs]

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a parameter or the input was overwritten since."""
        now = self._present_versions()
        changed = [name for name, version in self._versions.items() if now[name] != version]
        if changed:
            raise RuntimeError(
                f"expected {changed[0]} as it was in the forward pass, which backward() repeats, "
                "got one that was overwritten since; call backward() before the optimizer's step()"
            )

    def _present_versions(self) -> dict[str, int]:
        versions = {"the input": self._given._version}
        for (path, _), tables in zip(self._named, self._tables, strict=True):
            for name, version in _versions(tables.parameters).items():
                versions[f"parameter {path}.{name}".replace(" .", " ")] = version
        return versions


class SecondPass:
    """A context in which the module is as it was before the first pass."""

    def __init__(self, first: FirstPass) -> None:
        self._first = first
        self._present: list[Tables] = []

    def __enter__(self) -> None:
        self._first.check_unchanged()
        self._present = [_tables(module) for module in self._first.modules]
        for module, tables in zip(self._first.modules, self._first.tables(), strict=True):
            _install(module, tables)

    def __exit__(self, *error: object) -> None:
        for module, tables in zip(self._first.modules, self._present, strict=True):
            _install(module, tables)


def _versions(buffers: dict[str, Any]) -> dict[str, int]:
    return {name: value._version for name, value in buffers.items() if value is not None}


def _copies(buffers: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in buffers.items() if value is not None}
