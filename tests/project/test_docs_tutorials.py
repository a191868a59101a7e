"""Every tutorial works as it stands: its blocks run in their order, in a fresh process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_blocks import ROOT

import experiments  # noqa: F401  (the pages use its commands)

DOCS = ROOT / "docs"
QUICK = ("choosing", "tutorials/anil", "tutorials/imaml", "tutorials/folder")
LONG = ("tutorials/lightning", "tutorials/mongodb", "tutorials/torchrun")


def surroundings(folder: Path) -> dict[str, str]:
    """This Python first on the path, its library from the checkout, all data in ``folder``."""
    binaries = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([binaries, os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "L2L_IMPLICIT_DATA": str(folder / "data"),
        "OMP_NUM_THREADS": "1",
    }


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


def follow(name: str, folder: Path, **environment: str) -> None:
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs_tutorial.py"), str(DOCS / f"{name}.md")],
        cwd=folder,
        env={**surroundings(folder), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout[-4000:]


def test_all_tutorials_are_followed() -> None:
    found = {f"tutorials/{path.stem}" for path in (DOCS / "tutorials").glob("*.md")}
    assert found and found == {*QUICK, *LONG} - {"choosing"}


@pytest.mark.parametrize("name", QUICK)
def test_tutorial(name: str, tmp_path: Path) -> None:
    follow(name, tmp_path)


@pytest.mark.slow
def test_tutorial_lightning(tmp_path: Path) -> None:
    if importlib.util.find_spec("pytorch_lightning") is None:
        pytest.skip("needs pytorch-lightning")
    follow("tutorials/lightning", tmp_path)


@pytest.mark.slow
def test_tutorial_torchrun(tmp_path: Path) -> None:
    follow("tutorials/torchrun", tmp_path)


@pytest.mark.slow
def test_tutorial_mongodb(tmp_path: Path, mongo_url: str) -> None:
    follow("tutorials/mongodb", tmp_path, L2L_IMPLICIT_MONGO_URL=mongo_url)
