"""How many lines, files and functions it takes: the bars, counted.

`python tests/core/test_structure.py` prints the table.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

PACKAGE = Path(__file__).parents[2] / "l2l_implicit"
CORE = (
    "learner.py", "together.py", "implicit_diff.py", "diagnostics.py", "per_task_norm.py",
    "inner_problem", "inner_solvers", "linear_solvers",
)  # fmt: skip
# The aims are 3,200 and 7,600 lines; these are where it stands, so that it does not grow.
CORE_LINES, LIBRARY_LINES, FILES, FUNCTIONS = 3550, 7600, 12, 80


def lines_of(path: Path) -> int:
    files = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


def core_lines() -> dict[str, int]:
    """Of each part of the core."""
    return {name: lines_of(PACKAGE / name) for name in CORE}


def functions_run(run: Callable[[], None]) -> set[CodeType]:
    """The package's code objects that ``run`` goes through: comprehensions count too.

    Of this thread; the backward pass of a graph on the CPU runs in it too.
    """
    found: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            found.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def closure_and_backward(head: Any) -> None:
    """A task as the README has it: a clone, K = 20 steps of a closure, one hypergradient."""
    learner, h, y = head.clone(), torch.randn(25, 20, requires_grad=True) * 1.0, LABELS
    learner.adapt(lambda: F.cross_entropy(learner(h), y), steps=20)
    F.cross_entropy(learner(h), y).backward()


def losses_and_backward(head: Any) -> None:
    """A task as learn2learn's scripts have it: a clone, five losses, one hypergradient."""
    learner, h, y = head.clone(), torch.randn(25, 20, requires_grad=True) * 1.0, LABELS
    for _ in range(5):
        learner.adapt(F.cross_entropy(learner(h), y))
    F.cross_entropy(learner(h), y).backward()


LABELS = torch.arange(25) % 5
PATHS = {"adapt(closure)": closure_and_backward, "adapt(loss)": losses_and_backward}


def by_file(functions: set[CodeType]) -> Counter[str]:
    return Counter(str(Path(c.co_filename).relative_to(PACKAGE)) for c in functions)


def count(name: str) -> set[CodeType]:
    """Functions of a path; the learner is made once, not for each task, and so not among them."""
    from l2l_implicit import ImplicitCGHead

    head = ImplicitCGHead(nn.Linear(20, 5), lr=0.1)
    return functions_run(lambda: PATHS[name](head))


@pytest.mark.parametrize("name", PATHS)
def test_a_task_runs_through_few_files(name: str) -> None:
    files = by_file(count(name))
    assert len(files) <= FILES, files


@pytest.mark.parametrize("name", PATHS)
def test_a_task_runs_through_few_functions(name: str) -> None:
    files = by_file(count(name))
    assert files.total() <= FUNCTIONS, files


def test_the_core_is_short() -> None:
    lines = core_lines()
    assert sum(lines.values()) <= CORE_LINES, lines


def test_the_library_is_short() -> None:
    lines = {path.stem: lines_of(path) for path in PACKAGE.iterdir() if path.name[0] != "_"}
    assert lines_of(PACKAGE) <= LIBRARY_LINES, lines


def main() -> None:
    """Print the table."""
    for name in PATHS:
        found = count(name)
        files = by_file(found)
        named = sum(not c.co_name.startswith("<") for c in found)
        print(
            f"\n{name} and backward: {len(files)} files, {files.total()} functions, "
            f"{named} of them with a name"
        )
        for file, number in files.most_common():
            names = sorted(
                getattr(c, "co_qualname", c.co_name)
                for c in found
                if c.co_filename == str(PACKAGE / file)
            )
            print(f"{number:4d}  {file}: {', '.join(names)}")
    lines = core_lines()
    print(f"\ncore: {sum(lines.values())} lines; library: {lines_of(PACKAGE)} lines")
    for name, number in sorted(lines.items(), key=lambda pair: -pair[1]):
        print(f"{number:6d}  {name}")


if __name__ == "__main__":
    sys.path.insert(0, str(PACKAGE.parent))
    main()
