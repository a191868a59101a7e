"""Imports point one way, and the library needs no experiment."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "l2l_implicit"

# Each layer may import those before it, and a package itself, in the order below.
LAYERS = [
    {"vectors", "checks", "_compat", "mixed_precision"},
    {"linear_solvers", "module_state"},
    {"inner_problem", "chunked"},
    {"inner_solvers", "implicit_diff", "diagnostics"},
    {"task"},
    {"objective"},
    {"adaptation"},
    {"learner"},
    {"imaml", "gbml"},
    {"distributed"},
]
WITHIN = {
    "linear_solvers": [
        {"solution"},
        {"conjugate_gradient", "curvature", "direct_solve"},
        {"neumann_series"},
    ],
    "inner_problem": [
        {"boundary", "linear_losses", "regularizer", "support_features"},
        {"linearization", "recognition"},
        {"linear_head"},
        {"span"},
    ],
    "inner_solvers": [
        {"gradient_descent", "first_order"},
        {"newton", "lbfgs"},
        {"inner_loop"},
    ],
}
BESIDE = {"baselines", "batched", "lightning", "tasks"}  # packages on top of the core
ALLOWED_OUTSIDE = {"torch", "learn2learn", "l2l_implicit", *sys.stdlib_module_names}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def files(name: str) -> list[Path]:
    """Those of a module or package of the core."""
    module = PACKAGE / f"{name}.py"
    return [module] if module.exists() else sorted((PACKAGE / name).glob("*.py"))


def internal(path: Path, prefix: str) -> set[str]:
    """What a file imports right below ``prefix``."""
    names = {name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix)}
    return {name.split(".")[0] for name in names}


def below(layers: list[set[str]], level: int) -> set[str]:
    return set[str]().union(*layers[:level])


def test_every_module_has_a_layer() -> None:
    """A new file must say where it belongs."""
    found = {path.stem for path in PACKAGE.iterdir() if not path.name.startswith(("__", "py."))}
    assert found == set().union(*LAYERS) | BESIDE
    for package, layers in WITHIN.items():
        assert {path.stem for path in files(package)} == set().union(*layers) | {"__init__"}


@pytest.mark.parametrize("level", range(len(LAYERS)))
def test_imports_point_down(level: int) -> None:
    core = set().union(*LAYERS)
    for name in LAYERS[level]:
        for path in files(name):
            used = internal(path, "l2l_implicit.") & core
            assert used <= below(LAYERS, level) | {name}, path


@pytest.mark.parametrize("package", WITHIN)
def test_imports_point_down_within(package: str) -> None:
    layers = WITHIN[package]
    for level, names in enumerate(layers):
        for name in names:
            used = internal(PACKAGE / package / f"{name}.py", f"l2l_implicit.{package}.")
            assert used <= below(layers, level), name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_experiment_is_imported(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {"experiments", "sacred", "pymongo", "matplotlib"}


def test_the_core_needs_torch_and_learn2learn_only() -> None:
    for path in (path for layer in LAYERS for name in layer for path in files(name)):
        outside = {item.split(".")[0] for item in imports(path)}
        assert outside <= ALLOWED_OUTSIDE, path


def test_importing_the_library_loads_no_experiment() -> None:
    """Of the extras learn2learn itself loads pytorch_lightning, where that is installed."""
    code = (
        "import sys, l2l_implicit\n"
        "bad = {'experiments', 'sacred', 'pymongo', 'higher', 'l2l_implicit.lightning'}\n"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
