"""Imports point one way, the library needs no experiment, and it does not grow.

`python tests/core/test_layers.py` prints how many lines, files and functions it takes.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
import torch.nn.functional as F
from small_task import adapt
from torch import nn

from l2l_implicit import ImplicitCGHead

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
        {"linearization", "passes"},
        {"linear_heads", "second_derivative", "gauss_newton"},
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


def core_files() -> list[Path]:
    return [path for layer in LAYERS for name in layer for path in files(name)]


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
    core = set[str]().union(*LAYERS)
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
    for path in core_files():
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
    for path in (path for path in core_files() if path.stem not in knows):
        found = {name for name in names_in(path) if any(word in name for word in INTERNALS)}
        assert not found - OWN_FUNCTION, path
    for stem in knows:  # the words are those that they use
        path = next(PACKAGE.rglob(f"{stem}.py"))
        assert any("next_functions" in name for name in names_in(path))


METHODS = {
    "newton", "gradient", "lbfgs", "cg", "neumann", "direct", "auto", "fomaml", "gradient_descent",
    "cross_entropy", "squared_error", "conjugate_gradient",
}  # fmt: skip


def test_no_string_names_a_method() -> None:
    """Methods are objects here; names for them are the experiments'."""
    for path in core_files():
        nodes = ast.walk(ast.parse(path.read_text()))
        strings = {n.value for n in nodes if isinstance(n, ast.Constant)}
        assert not METHODS & set(names_in(path)) & strings, path


def test_every_class_name_stands_for_one_thing() -> None:
    where: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: found for name, found in where.items() if len(found) > 1} == {}


# How much it is: where it stands, so that it does not grow. The aims are 3,200 and 7,600 lines.

CORE = (
    "learner.py", "together.py", "implicit_diff.py", "diagnostics.py", "per_task_norm.py",
    "inner_problem", "inner_solvers", "linear_solvers",
)  # fmt: skip
CORE_LINES, LIBRARY_LINES, FILES, FUNCTIONS = 4150, 8220, 12, 82
LABELS = torch.arange(25) % 5


def lines_of(path: Path) -> int:
    found = path.rglob("*.py") if path.is_dir() else [path]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in found)


def functions_run(how: str, steps: int) -> Counter[str]:
    """The functions of each file that a task runs through, from its clone to its hypergradient.

    Comprehensions count too. Of this thread; the backward pass of a graph on the CPU runs in it.
    """
    head, found = ImplicitCGHead(nn.Linear(20, 5), lr=0.1), set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            found.add(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        learner, h = head.clone(), torch.randn(25, 20, requires_grad=True) * 1.0
        adapt(learner, lambda: F.cross_entropy(learner(h), LABELS), how, steps)
        F.cross_entropy(learner(h), LABELS).backward()
    finally:
        sys.setprofile(before)
    return Counter(str(Path(c.co_filename).relative_to(PACKAGE)) for c in found)


WAYS = {"closure": 20, "loss": 5}  # the README's, and learn2learn's


@pytest.mark.parametrize("how", WAYS)
def test_a_task_runs_through_few_files_and_functions(how: str) -> None:
    found = functions_run(how, WAYS[how])
    assert len(found) <= FILES and found.total() <= FUNCTIONS, found


def test_the_library_is_short() -> None:
    lines = {path.stem: lines_of(path) for path in PACKAGE.iterdir() if path.name[0] != "_"}
    assert lines_of(PACKAGE) <= LIBRARY_LINES, lines
    assert sum(lines_of(PACKAGE / name) for name in CORE) <= CORE_LINES, lines


if __name__ == "__main__":
    for how, steps in WAYS.items():
        print(how, *functions_run(how, steps).most_common(), sep="\n  ")
    print("lines", lines_of(PACKAGE), *((name, lines_of(PACKAGE / name)) for name in CORE))
