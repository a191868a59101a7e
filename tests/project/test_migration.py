"""The changelog's tables of old and new names: complete, and what they lead to exists."""

import pkgutil
import re
from pathlib import Path

import pytest
from torch import nn

import l2l_implicit
from experiments.ingredients.algorithm_table import ALGORITHMS, ALIASES
from experiments.sweep import SWEEPS
from experiments.sweeps.definitions import ACCURACY
from l2l_implicit import checks

TEXT = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
SECTION = TEXT.partition("### Migration\n")[2].partition("\n### ")[0]
ROWS = [tuple(re.split(r" \| ", line[2:-2])) for line in SECTION.splitlines()
        if line.startswith("| ") and not line.startswith("| 0.1 ")]  # fmt: skip
CODE = re.compile(r"`([^`]+)`")
OLD = {code for old, _ in ROWS for code in CODE.findall(old)}
NEW = {code for _, new in ROWS for code in CODE.findall(new)}
NUMBERS = {"t": 1e-3, "N": 7, "a": 0.1, "d": 0.1}


def test_every_keyword_that_is_refused_is_in_the_table() -> None:
    refused = set(checks._RENAMED)
    assert {code.partition("=")[0] for code in OLD if "=" in code} >= refused | {"lr"}
    for key in refused:
        with pytest.raises(TypeError, match=f"^{key}: expected .*, got the keyword of an earlier"):
            l2l_implicit.ImplicitCGHead(nn.Linear(2, 2), 0.1, **{key: 1})
    with pytest.raises(TypeError, match=r"^lr: expected a number.*adaptive=True"):
        l2l_implicit.ImplicitCGHead(nn.Linear(2, 2), "auto")


@pytest.mark.parametrize(
    "code", sorted(code for code in NEW if re.match(r"(inner|linear|max_error|l2)=\S", code))
)
def test_the_new_keyword_is_taken(code: str) -> None:
    name, _, value = code.partition("=")
    given = eval(value, vars(l2l_implicit) | NUMBERS)
    learner = l2l_implicit.ImplicitCGHead(nn.Linear(2, 2), 0.1, **{name: given})
    assert getattr(learner, name) == given


def _exists(path: str) -> bool:
    """Whether a dotted path is a module, or a name in one."""
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


def _paths(codes: set[str]) -> set[str]:
    """The dotted names of the library and the experiments in pieces of code."""
    found = {
        path for code in codes for path in re.findall(r"(?:l2l_implicit|experiments)[\w.]+", code)
    }
    return {path for path in found if "." in path}


def test_old_names_are_gone_and_new_ones_exist() -> None:
    old, new = _paths(OLD), _paths(NEW)
    kept = {"experiments.tracking.export", "experiments.benchmark"}  # with other arguments
    assert len(old) >= 9 and [path for path in old - kept - {"experiments.drills.NAME"}
                              if _exists(path)] == []  # fmt: skip
    assert len(new) >= 8 and [path for path in new if not _exists(path)] == []


def test_other_names_of_algorithms_and_rows_are_in_the_table() -> None:
    assert set(ALIASES) <= OLD and set(ALIASES.values()) <= NEW & set(ALGORITHMS)
    assert {"as_printed", "as_released"} <= NEW & set(ACCURACY.methods)
    rows = {"rm_metal_paper", "rm_metal_as_released"}
    assert rows <= OLD - set(ACCURACY.methods) and "regularisers" not in SWEEPS


def test_an_empty_section_waits_for_the_next_release() -> None:
    """And the version that the library states is the newest that the changelog closes."""
    first, second = re.findall(r"^## \[(\S+)\]", TEXT, re.MULTILINE)[:2]
    assert (first, second) == ("Unreleased", l2l_implicit.__version__)
