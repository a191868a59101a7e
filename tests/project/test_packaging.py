"""What installs, what it may import, and that the documented commands are the tested ones.

Nothing here imports torch: the links are checked in an environment that has only pytest.
"""

import ast
import itertools
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import mutations
import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from without_extras import without_extras

ROOT = Path(__file__).parents[2]
TRAIN = "pip install -U pip && pip install -r requirements.txt && python -m experiments.train"
TEST = "pip install tox && tox -e py"
LITERAL = ("python_requires", "install_requires", "package_data")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def setup_keywords() -> dict[str, Any]:
    """The arguments of `setup(...)` named in LITERAL, and the extras, without running setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if getattr(node.func, "id", None) == "setup"]
    (extras,) = [node.value for node in tree.body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTRAS"
                 ]  # fmt: skip
    values = {keyword.arg: keyword.value for keyword in call.keywords}
    literal = {"extras": extras, **{name: values[name] for name in LITERAL}}
    return {name: ast.literal_eval(value) for name, value in literal.items()}


def requirement_lines(name: str) -> Iterator[str]:
    """The lines of a requirements file and of those it includes, without options and comments."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from requirement_lines(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            yield line.split(" --")[0]


def pins() -> dict[str, Version]:
    """Name and version of every requirement; one without a pin fails."""
    stated = list(requirement_lines("requirements.txt"))
    pairs = [re.fullmatch(r"([\w-]+)==(\S+)", line) for line in stated]
    assert None not in pairs, f"expected NAME==VERSION on every line, got {stated}"
    return {pair[1]: Version(pair[2]) for pair in pairs if pair}


def oldest(asked: Requirement) -> Version:
    """The lowest version of it in requirements-oldest.txt, over all Pythons that it is asked on."""

    def on(required: Requirement, python: str) -> bool:
        return required.marker is None or required.marker.evaluate({"python_version": python})

    lines = [Requirement(line) for line in requirement_lines("requirements-oldest.txt")]
    own = [line for line in lines if line.name == asked.name]
    return min(
        Version(specifier.version)
        for python, line in itertools.product(("3.11", "3.12", "3.13"), own)
        if on(asked, python) and on(line, python)
        for specifier in line.specifier
    )


def ranges(*extras: str) -> list[Requirement]:
    """What setup.py asks for, with the extras named."""
    keywords = setup_keywords()
    lists = [keywords["install_requires"], *(keywords["extras"][extra] for extra in extras)]
    return [Requirement(text) for texts in lists for text in texts]


def text_of(document: Path) -> str:
    """A Markdown file without its fenced blocks."""
    return FENCED.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as code hosts derive them."""
    titles = re.findall(r"^#+ +(.*?) *$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_what_is_asked_for() -> None:
    assert setup_keywords()["python_requires"] == ">=3.11"
    assert {r.name for r in ranges()} == {"torch", "learn2learn", "numpy"}  # the learner alone
    extras = setup_keywords()["extras"]
    assert set(extras) == {"experiments", "baselines", "lightning", "huggingface", "dev"}
    assert {"sacred", "pymongo"} <= {Requirement(text).name for text in extras["experiments"]}


@pytest.mark.parametrize("required", ranges("experiments", "baselines"), ids=str)
def test_the_pins_satisfy_the_ranges(required: Requirement) -> None:
    assert required.specifier.contains(pins()[required.name], prereleases=True)


@pytest.mark.parametrize("required", ranges("experiments", "baselines", "lightning"), ids=str)
def test_the_oldest_that_is_tested_is_the_oldest_that_is_accepted(required: Requirement) -> None:
    pin = oldest(required)
    for bound in [Version(s.version) for s in required.specifier if s.operator == ">="]:
        assert pin.release[: len(bound.release)] == bound.release
    assert required.specifier.contains(pin, prereleases=True)


def test_torch_and_torchvision_are_pinned_as_a_pair() -> None:
    torch, torchvision = pins()["torch"], pins()["torchvision"]
    assert torchvision.minor == torch.minor + 15  # torch 2.0 came with 0.15, and so on since


def test_learn2learn_is_compiled_from_its_pyx_files() -> None:
    option = 'learn2learn==0.2.0 --config-settings="--build-option=build_ext"'
    text = (ROOT / "requirements-learn2learn.txt").read_text(encoding="utf-8")
    assert option in text.splitlines()


def test_the_version_is_stated_once() -> None:
    """In l2l_implicit/__init__.py; setup.py reads it there, and nobody else repeats it."""
    text = (ROOT / "l2l_implicit" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', text, re.MULTILINE)
    assert "version=read_version()" in (ROOT / "setup.py").read_text(encoding="utf-8")
    others = [*ROOT.glob("*.toml"), *ROOT.glob("*.cfg"), *ROOT.glob("*.yml"), ROOT / "setup.py"]
    others += [p for p in (ROOT / "l2l_implicit").rglob("*.py") if p.name != "__init__.py"]
    assert len(others) > 40
    statement = re.compile(rf"version\W{{1,5}}{re.escape(version)}\b", re.IGNORECASE)
    assert not [path for path in others if statement.search(path.read_text(encoding="utf-8"))]


def test_every_mutation_still_applies() -> None:
    """What `python tests/mutations.py` changes is there, once, and Python afterwards."""
    assert all(mutations.line_of(mutation) for mutation in mutations.MUTATIONS)


@pytest.mark.parametrize("pattern", ["py.typed", "tasks/*.npz", "tasks/*.md"])
def test_package_data_exists_and_is_declared(pattern: str) -> None:
    assert list((ROOT / "l2l_implicit").glob(pattern))
    assert pattern in setup_keywords()["package_data"]["l2l_implicit"]


@pytest.mark.parametrize("folder", ["l2l_implicit", "experiments", "tests"])
def test_the_sdist_takes_every_source(folder: str) -> None:
    lines = (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()
    (patterns,) = [line.split()[2:] for line in lines if f"recursive-include {folder} " in line]
    files = [path.name for path in (ROOT / folder).rglob("*") if path.is_file()]
    files = [name for name in files if not name.endswith(".pyc")]
    assert files and [n for n in files if not any(fnmatch(n, p) for p in patterns)] == []


def test_the_minimal_run_has_the_library_tests_and_not_the_experiments() -> None:
    names = {path.stem for path in without_extras()}
    assert {"test_compat", "test_packaging"} <= names
    assert not {name for name in names if name.startswith("test_tracking")}


def test_the_readme_gives_the_commands_and_ci_runs_one() -> None:
    blocks = SHELL.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    assert TRAIN in lines and TEST in lines
    if (ROOT / "PKG-INFO").exists():
        return  # an sdist, which has no hidden files
    script = ROOT / ".ci" / "run"
    assert script.read_text(encoding="utf-8").splitlines()[-1] == TEST
    assert os.access(script, os.X_OK)


def test_internal_links_resolve() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [(file, link) for file in documents for link in LINK.findall(text_of(file))
             if not re.match(r"[a-z]+:", link)]  # fmt: skip
    broken = []
    for document, link in links:
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{document.relative_to(ROOT)}: {link}")
    assert links and not broken
