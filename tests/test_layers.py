"""Imports point one way, and the library needs no experiment."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "l2l_implicit"

# Each layer may import those before it.
LAYERS = [
    {"vectors", "checks", "_compat", "mixed_precision"},
    {"linear_solve", "regularizer", "linear_losses", "support_features", "module_state",
     "boundary"},
    {"curvature", "direct_solve"},
    {"linearization", "neumann_series", "chunked"},
    {"recognition", "implicit_diff", "inner_steps", "diagnostics", "first_order"},
    {"linear_head", "newton", "lbfgs"},
    {"span"},
    {"inner_loop"},
    {"task"},
    {"objective"},
    {"adaptation"},
    {"learner"},
    {"imaml", "gbml"},
    {"distributed", "theory"},
]
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


def internal(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imports(path) if name.startswith("l2l_implicit.")}
    return names & {name for layer in LAYERS for name in layer}


def test_every_module_has_a_layer() -> None:
    """A new file must say where it belongs."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert files <= {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("level", range(len(LAYERS)))
def test_imports_point_down(level: int) -> None:
    below = {name for layer in LAYERS[:level] for name in layer}
    for name in LAYERS[level]:
        assert internal(PACKAGE / f"{name}.py") <= below, name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_experiment_is_imported(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in {"experiments", "sacred", "pymongo", "matplotlib"}


def test_the_core_needs_torch_and_learn2learn_only() -> None:
    for layer in LAYERS:
        for name in layer:
            outside = {item.split(".")[0] for item in imports(PACKAGE / f"{name}.py")}
            assert outside <= ALLOWED_OUTSIDE, name


def test_importing_the_library_loads_no_experiment() -> None:
    """Of the extras learn2learn itself loads pytorch_lightning, where that is installed."""
    code = (
        "import sys, l2l_implicit\n"
        "bad = {'experiments', 'sacred', 'pymongo', 'higher', 'l2l_implicit.lightning'}\n"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
