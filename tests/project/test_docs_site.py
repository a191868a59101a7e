"""The pages of the site agree with the code: API, symbols, figures, navigation. No torch."""

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_blocks import ROOT
from PIL import Image

DOCS = ROOT / "docs"
PACKAGE = ROOT / "l2l_implicit"
# A package says what it offers in __all__; in a module that is what has no underscore.
OFFERED = {
    "l2l_implicit": PACKAGE / "__init__.py",
    **{f"l2l_implicit.{name}": PACKAGE / name / "__init__.py"
       for name in ("baselines", "lightning", "tasks")},
    **{f"l2l_implicit.{name}": PACKAGE / f"{name}.py"
       for name in ("distributed", "per_task_norm")},
    "experiments.papers.convergence.theory": ROOT / "experiments/papers/convergence/theory.py",
}  # fmt: skip
IDENTIFIER = re.compile(r"^::: (\S+)$", re.MULTILINE)
SYMBOL = re.compile(r"\| `([\w/]+\.py)`: `([\w.]+)` \|$", re.MULTILINE)
PAGE = re.compile(r"^ +- [^:]+: (\S+\.md)$", re.MULTILINE)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(node: ast.AST, prefix: str = "") -> Iterator[str]:
    """Dotted names of the functions and classes in a file, methods included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name
            yield from definitions(child, f"{prefix}{child.name}.")


def offered(path: Path) -> set[str]:
    """The names in ``__all__``, or without one the public functions and classes."""
    for node in tree(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    names = [node.name for node in tree(path).body if hasattr(node, "name")]
    return {name for name in names if not name.startswith("_")}


def documented() -> set[str]:
    pages = sorted((DOCS / "api").glob("*.md"))
    return {name for page in pages for name in IDENTIFIER.findall(page.read_text(encoding="utf-8"))}


SYMBOLS = SYMBOL.findall((DOCS / "mathematics.md").read_text(encoding="utf-8"))
assert len(SYMBOLS) > 25


@pytest.mark.parametrize("package", OFFERED)
def test_everything_public_is_in_the_api(package: str) -> None:
    names = {f"{package}.{name}" for name in offered(OFFERED[package])}
    assert names and not names - documented()


def test_the_api_documents_what_exists() -> None:
    """What is not offered by a package is looked for in its module."""
    known = {f"{package}.{name}" for package, path in OFFERED.items() for name in offered(path)}
    for name in documented() - known:
        module, _, last = name.rpartition(".")
        source = ROOT / f"{module.replace('.', '/')}.py"
        assert last in definitions(tree(source)) or f"\n{last} = " in source.read_text(), name


@pytest.mark.parametrize(("file", "name"), SYMBOLS)
def test_a_symbol_is_where_the_table_says(file: str, name: str) -> None:
    assert name in definitions(tree(ROOT / file))


def test_the_cost_figure_shows_the_table() -> None:
    pytest.importorskip("matplotlib", reason="the extra experiments is not installed")
    text = (DOCS / "cost.md").read_text(encoding="utf-8")
    program = runpy.run_path(str(DOCS / "figures" / "time_and_memory.py"))
    costs = program["read"](text)
    assert {name for name, _, _ in program["METHODS"]} < set(costs)
    assert all(set(of) == {1, 5, 20, 100} for of in costs.values())
    assert "figures/time_and_memory.png" in text
    with Image.open(DOCS / "figures" / "time_and_memory.png") as picture:
        assert picture.text["Description"] == program["digest"](costs)


def test_the_navigation_has_every_page() -> None:
    listed = PAGE.findall((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert {page for page in listed if not page.startswith("repository/")} == pages


def test_the_home_figure_shows_the_table_and_the_runs() -> None:
    pytest.importorskip("matplotlib", reason="the extra experiments is not installed")
    program = runpy.run_path(str(DOCS / "figures" / "accuracy_and_memory.py"))
    memory, curves = program["read_memory"](), program["read_runs"]()
    assert all(set(of) == {1, 5, 20, 100} for of in memory.values())
    assert all(value < 1.1 for value in memory["implicit, newton"].values())
    assert all(set(seeds) == {0, 1, 2} for seeds in curves.values())
    ours = curves["ImplicitCGHead"].values()
    assert all(max(run.accuracies) - min(run.accuracies[-3:]) < 0.1 for run in ours)
    with Image.open(DOCS / "figures" / "accuracy_and_memory.png") as picture:
        assert picture.text["Description"] == program["digest"](memory, curves)
