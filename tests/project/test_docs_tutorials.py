"""Every tutorial works as it stands: its blocks run in their order, in a fresh process.

In full, it prints what the page says: the quick ones always, all with `-m "slow or not slow"`.
"""

import os
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
from docs_blocks import ROOT
from toy_process import served
from warm_process import run

import experiments  # noqa: F401  (the pages use its commands)

DOCS = ROOT / "docs"
PAGES = ("choosing", "perturbed")  # with blocks that build on each other, as a tutorial's
SHORTENED = ("tutorials/anil", "tutorials/imaml")  # but for the slow test
QUICK = ("tutorials/folder", "tutorials/hyper_cleaning", "tutorials/per_class_l2",
         "tutorials/feature_scale")  # fmt: skip
LONG = (*SHORTENED, "tutorials/lightning", "tutorials/mongodb", "tutorials/torchrun")
FULL = ("--full",)


def answer(page: Path, folder: Path, *options: str, **env: str) -> tuple[int, str]:
    """Exit status of following a page in a folder of its own, and all that it says.

    With this Python first on the path, and its library from the checkout.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"L2L_IMPLICIT_DATA": str(folder / "data"), "OMP_NUM_THREADS": "1", "PATH": path,
           "PYTHONPATH": str(ROOT)}  # fmt: skip
    program = ROOT / "tests" / "helpers" / "docs_blocks.py"
    done = run([program, *options, page], folder, {**os.environ, **own, **env})
    return done.returncode, done.stdout + done.stderr


def test_all_tutorials_are_followed() -> None:
    found = {f"tutorials/{path.stem}" for path in (DOCS / "tutorials").glob("*.md")}
    assert found and found == {*QUICK, *LONG}


@pytest.mark.parametrize(("name", "options"), [
    *((name, ()) for name in (*PAGES, *SHORTENED)), *((name, FULL) for name in QUICK),
    *(pytest.param(name, FULL, marks=pytest.mark.slow) for name in LONG),
])  # fmt: skip
def test_tutorial(name: str, options: tuple[str, ...], tmp_path: Path) -> None:
    if name.endswith("lightning") and find_spec("pytorch_lightning") is None:
        pytest.skip("the extra lightning is not installed")
    with served(tmp_path / "data") if name.endswith("mongodb") else nullcontext("") as url:
        env = {"L2L_IMPLICIT_MONGO_URL": url} if url else {}
        status, printed = answer(DOCS / f"{name}.md", tmp_path, *options, **env)
    assert status == 0, printed[-4000:]


PAGE = """
```python
rate, count, error = 0.5, 100, 3.2e-12
```
<!-- shortened in tests: count = 3 -->
```python
print(f"accuracy {rate:.2f} of {count}, error {error:.1e}, at {object()}")
```
```output title="on another processor within 0.02"
accuracy 0.51 of 100, error 9.0e-13, at <object ...>
```
"""
"""As in a tutorial: shortened in the quick test, and with a figure that is only near."""


@pytest.mark.parametrize(("old", "new", "says"), [
    ("0.51", "0.51", ""),
    ("0.51", "0.53", "0.50 for 0.53"),
    ("of 100,", "of 101,", "100 for 101"),
    ("9.0e-13", "9.0e-14", "3.2e-12 for 9.0e-14"),
    ("accuracy 0.51", "loss 0.51", "another text"),
    (" title=\"on another processor within 0.02\"\naccuracy 0.51", "\naccuracy 0.52", "0.50 for"),
    ("```output", "```text", "a block of output"),
])  # fmt: skip
def test_a_wrong_figure_on_a_page_is_found(old: str, new: str, says: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace(old, new), encoding="utf-8")
    status, printed = answer(page, tmp_path, "--full")
    assert (status == 0) == (not says) and says in printed, printed
    assert "accuracy 0.50 of 3," in answer(page, tmp_path)[1]
