"""Imports point one way, and the library needs no experiment."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "l2l_implicit"

# Each layer may import those before it, and a package itself, in the order below.
LAYERS = [
    {"vectors", "checks", "_compat", "mixed_precision"},
    {"linear_solvers", "module_state"},
    {"inner_problem", "chunked"},
    {"inner_solvers", "implicit_diff", "diagnostics", "per_task_norm"},
    {"together"},
    {"learner"},
    {"imaml", "gbml"},
    {"distributed"},
]
WITHIN = {
    "linear_solvers": [
        {"solution"},
        {"conjugate_gradient", "curvature", "direct"},
        {"neumann"},
    ],
    "inner_problem": [
        {"boundary", "losses"},
        {"linearization"},
        {"linear_heads", "second_derivative"},
        {"recognition"},
    ],
    "inner_solvers": [
        {"protocol"},
        {"gradient_descent", "newton", "lbfgs"},
    ],
}
BESIDE = {"baselines", "lightning", "tasks"}  # packages on top of the core
ALLOWED_OUTSIDE = {"torch", "learn2learn", "l2l_implicit", *sys.stdlib_module_names}


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports when it runs, wherever in it the import stands."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in types_only:
            continue
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


# Who knows what


INTERNALS = (
    "grad_fn", "next_functions", "_saved_", "saved_tensors", "GradientEdge", "get_gradient_edge",
    "register_prehook", "AccumulateGrad", "_backward_cls", "output_nr",
)  # fmt: skip
OWN_FUNCTION = {"ctx.saved_tensors", "saved_tensors_hooks"}  # a Function's use of what it saved


def names_in(path: Path) -> Iterator[str]:
    """Every name, attribute and string of a file's code; docstrings and comments are not code."""
    tree = ast.parse(path.read_text())
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.Name | ast.alias):
            yield node.id if isinstance(node, ast.Name) else node.name
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
        ):
            yield node.value


def test_two_files_know_torchs_graph() -> None:
    """Another torch that builds another graph is another boundary and recognition, no more."""
    knows = {"recognition", "boundary"}
    core = [path for layer in LAYERS for name in layer for path in files(name)]
    for path in (path for path in core if path.stem not in knows):
        found = {name for name in names_in(path) if any(word in name for word in INTERNALS)}
        assert not found - OWN_FUNCTION, path
    for stem in knows:  # the words are those that they use
        assert any("next_functions" in name for name in names_in(path_of(stem)))


def path_of(stem: str) -> Path:
    return next(PACKAGE.rglob(f"{stem}.py"))


METHODS = {
    "newton", "gradient", "lbfgs", "cg", "neumann", "direct", "auto", "fomaml", "gradient_descent",
    "cross_entropy", "squared_error", "conjugate_gradient",
}  # fmt: skip


def test_no_string_names_a_method() -> None:
    """Methods are objects here; names for them are the experiments'."""
    for path in (path for layer in LAYERS for name in layer for path in files(name)):
        assert not METHODS & set(names_in(path)) & strings_in(path), path


def strings_in(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_every_class_name_stands_for_one_thing() -> None:
    where: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in where.items() if len(found) > 1} == {}


def test_importing_the_library_loads_no_experiment() -> None:
    """Of the extras learn2learn itself loads pytorch_lightning, where that is installed."""
    code = (
        "import sys, l2l_implicit\n"
        "bad = {'experiments', 'sacred', 'pymongo', 'higher', 'l2l_implicit.lightning'}\n"
        "sys.exit(str(bad & set(sys.modules)) if bad & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
