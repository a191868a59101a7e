"""Runs the tests that need no extra: `python tests/without_extras.py [pytest's arguments]`.

A test file is left out if it imports, itself or through a helper, what only an extra
brings. So there is no list to keep, and a new test of the library is in without a word.
"""

import ast
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXTRAS = {"experiments", "matplotlib", "pymongo", "sacred", "secantus",
          "higher", "lightning", "pytorch_lightning"}  # fmt: skip


def names_of(path: Path) -> list[str]:
    """The dotted names that a source file imports, anywhere in it, but for those beside it."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imported(path: Path) -> set[str]:
    """The top-level packages among them."""
    return {name.partition(".")[0] for name in names_of(path)}


def reached(path: Path) -> set[str]:
    """The packages that a test file imports, itself or through helpers."""
    names, seen = imported(path), {path.stem}
    beside = {p.stem: p for folder in (TESTS, TESTS / "helpers", path.parent)
              for p in folder.glob("*.py")}
    while helpers := names & beside.keys() - seen:
        seen |= helpers
        names = names.union(*(imported(beside[name]) for name in helpers))
    return names


def without_extras() -> list[Path]:
    """The test files that run where the library alone is installed."""
    return [path for path in sorted(TESTS.rglob("test_*.py")) if not reached(path) & EXTRAS]


if __name__ == "__main__":
    sys.exit(pytest.main([*map(str, without_extras()), *sys.argv[1:]]))
