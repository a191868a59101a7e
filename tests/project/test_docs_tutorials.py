"""Every tutorial works as it stands: its blocks run in their order, in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_blocks import ROOT

import experiments  # noqa: F401  (the pages use its commands)

DOCS = ROOT / "docs"
PAGES = ("choosing", "perturbed")
EXAMPLES = ("tutorials/hyper_cleaning", "tutorials/per_class_l2", "tutorials/feature_scale")
QUICK = (*PAGES, "tutorials/anil", "tutorials/imaml", "tutorials/folder", *EXAMPLES)
LONG = ("tutorials/lightning", "tutorials/mongodb", "tutorials/torchrun")


def surroundings(folder: Path) -> dict[str, str]:
    """This Python first on the path, its library from the checkout, all data in ``folder``."""
    binaries = str(Path(sys.executable).parent)
    own = {"L2L_IMPLICIT_DATA": str(folder / "data"), "OMP_NUM_THREADS": "1",
           "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
           "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])}  # fmt: skip
    return {**os.environ, **own}


@pytest.fixture
def mongo_url(tmp_path: Path) -> Iterator[str]:
    """The address of a server that is up."""
    command = [sys.executable, "-m", "experiments.tracking.serve"]
    with subprocess.Popen(
        command, cwd=ROOT, env=surroundings(tmp_path), stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


def test_all_tutorials_are_followed() -> None:
    found = {f"tutorials/{path.stem}" for path in (DOCS / "tutorials").glob("*.md")}
    assert found and found == {*QUICK, *LONG} - {*PAGES}


@pytest.mark.parametrize("name", [
    *QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)
])  # fmt: skip
def test_tutorial(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name.endswith("lightning"):
        pytest.importorskip("pytorch_lightning")
    env, program = surroundings(tmp_path), ROOT / "tests" / "helpers" / "docs_blocks.py"
    if name.endswith("mongodb"):
        env["L2L_IMPLICIT_MONGO_URL"] = request.getfixturevalue("mongo_url")
    answer = subprocess.run(
        [sys.executable, program, DOCS / f"{name}.md"], cwd=tmp_path, text=True, env=env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout[-4000:]
