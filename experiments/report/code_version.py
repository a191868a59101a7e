"""Which code a run was made by, and in what two codes differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PACKAGES = ("torch", "torchvision", "learn2learn", "higher", "numpy")
"""Those a run's numbers depend on."""

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CodeVersion:
    """What Sacred recorded of the code.

    Attributes:
        commit: empty outside a repository.
        dirty: whether files differed from the commit.
        sources: (file, md5) pairs, sorted.
        packages: (name, version) pairs of `PACKAGES`.
    """

    commit: str
    dirty: bool
    sources: Pairs
    packages: Pairs

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for equal code. The commit counts only where no source file is recorded: another
        commit with the same files is the same code, and uncommitted changes are in the files."""
        code: tuple[Any, ...] = self.sources or (self.commit, self.dirty)
        return (code, self.packages)

    def __str__(self) -> str:
        """``a1b2c3d`` or ``a1b2c3d with uncommitted changes``."""
        commit = self.commit[:7] or "no commit"
        return f"{commit} with uncommitted changes" if self.dirty else commit


def read_code(experiment: Mapping[str, Any], md5: Mapping[Any, str]) -> CodeVersion:
    """The code version of Sacred's ``experiment`` document.

    Args:
        experiment: of the run.
        md5: of the source files, by their number in ``fs.files``.
    """
    repository = (experiment.get("repositories") or [{}])[0]
    sources = sorted((name, md5.get(file, str(file))) for name, file in experiment["sources"])
    versions = dict(_split(line) for line in experiment.get("dependencies") or ())
    packages = tuple((name, versions[name]) for name in PACKAGES if name in versions)
    commit = repository.get("commit") or ""
    return CodeVersion(commit, bool(repository.get("dirty")), tuple(sources), packages)


def code_differences(versions: Iterable[CodeVersion]) -> list[str]:
    """The files and packages that are not the same in all of these versions."""
    versions = list(versions)
    files = _unequal([dict(version.sources) for version in versions])
    packages = _unequal([dict(version.packages) for version in versions])
    if not (files or packages) and len({v.signature for v in versions}) > 1:
        return ["the commit or its uncommitted changes (no source file is recorded)"]
    return [*files, *packages]


def _unequal(tables: list[dict[str, str]]) -> list[str]:
    names = sorted({name for table in tables for name in table})
    return [name for name in names if len({table.get(name) for table in tables}) > 1]


def _split(requirement: str) -> tuple[str, str]:
    name, _, version = requirement.partition("==")
    return name, version
