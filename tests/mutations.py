"""Makes mistakes in copies of the library and shows which tests notice them.

Each mutation replaces one piece of text in one file. Words on the command line choose mutations by
part of their name. Exit status 1 if a mutation survives, does not apply any more (the text is gone,
or there twice) or is no valid Python, or if the tests fail without any. Takes minutes, so it is no
test itself; `tox -e mutations` runs it in an environment that has what it needs.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutation_list import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
COPIED = ("l2l_implicit", "experiments", "tests", "pyproject.toml")
TIMEOUT = 1800.0
HEAD = "| mutation | where | caught by (the first three functions) | cases |\n|---|---|---|---|"


class Outcome(NamedTuple):
    """The tests that failed, or why there is no answer."""

    failed: list[str]
    problem: str = ""


def line_of(mutation: Mutation) -> int:
    """The line that a mutation changes.

    Raises:
        ValueError: the text is not there exactly once, or would not be Python afterwards.
    """
    source = (ROOT / "l2l_implicit" / mutation.file).read_text(encoding="utf-8")
    if (times := source.count(mutation.old)) != 1:
        raise ValueError(f"expected {mutation.old!r} once in {mutation.file}, got {times} of it")
    try:
        ast.parse(source.replace(mutation.old, mutation.new))
    except SyntaxError as error:
        raise ValueError(f"expected Python after the mutation, got {error}") from None
    return source[: source.index(mutation.old)].count("\n") + 1


def unwanted(folder: str, names: list[str]) -> set[str]:
    """What is neither the library nor its tests, and what an earlier run has left."""
    kept = COPIED if Path(folder) == ROOT else names
    return {name for name in names if name not in kept or name == "__pycache__"}


def failures(folder: Path, tests: Iterable[str]) -> Outcome:
    """What pytest says in a copy."""
    parts = [name.partition("::") for name in tests]
    files = {path.stem: path for path in (folder / "tests").rglob("test_*.py")}
    chosen = [f"{files[f'test_{file}']}{colons}{test}" for file, colons, test in parts]
    options = ["-q", "--tb=no", "-rfE", "--assert=plain", "-p", "no:cacheprovider"]
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *chosen],
            cwd=folder, env=kept, text=True, capture_output=True, timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Outcome([], f"no end within {TIMEOUT:.0f} s")
    if done.returncode not in (0, 1):
        return Outcome([], f"pytest ended with {done.returncode}: {done.stdout[-500:]}")
    return Outcome(re.findall(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.M))


def outcome(tests: Iterable[str], *mutations: Mutation) -> Outcome:
    """The tests that fail in a copy with mutations; without any there must be none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(ROOT, folder, ignore=unwanted, dirs_exist_ok=True)
        for mutation in mutations:
            file = folder / "l2l_implicit" / mutation.file
            source = file.read_text(encoding="utf-8")
            file.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
        return failures(folder, tests)


def row(mutation: Mutation) -> tuple[str, bool]:
    """The row of the table, and whether tests caught the mutation."""
    try:
        where = f"{mutation.file}:{line_of(mutation)}"
        failed, problem = outcome(mutation.tests.split(), mutation)
    except ValueError as error:
        where, failed, problem = mutation.file, [], str(error)
    functions = dict.fromkeys(name.partition("[")[0].partition("::")[2] for name in failed)
    text = ", ".join(f"`{name}`" for name in [*functions][:3]) or f"**{problem or 'SURVIVED'}**"
    return f"| {mutation.name} | {where} | {text} | {len(failed)} |", bool(failed)


def main() -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*", help="parts of the names of mutations; none: all")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count(), help="at a time")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.words or any(w in m.name for w in options.words)]
    with ThreadPoolExecutor(options.jobs) as pool:
        intact = pool.submit(outcome, sorted({t for m in chosen for t in m.tests.split()}))
        rows = pool.map(row, chosen)
        print(HEAD, flush=True)
        caught = []
        for text, was_caught in rows:
            print(text, flush=True)
            caught.append(was_caught)
    print(f"\n{sum(caught)} of {len(caught)} mutations caught")
    if any(intact.result()):
        print(f"expected the tests to pass without a mutation, got {intact.result()}")
        return 1
    return 0 if all(caught) and caught else 1


if __name__ == "__main__":
    sys.exit(main())
