"""`python -m experiments.doctor` in real processes, where things are there and where not."""

import ast
import re
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import warm_process
from fake_mongod import FakeMongod
from toy_process import environment

from experiments.doctor import BROKEN, EXTRA, LIBRARY, PACKAGES, database, datasets, whole

ROOT = Path(__file__).parents[2]
TORCH = ("torch", "torchvision", "learn2learn", "l2l_implicit")
EXTRAS = ("higher", "pytorch_lightning", "sacred", "pymongo", "matplotlib")
# The module as the command line runs it, in a Python that has some packages not.
WITHOUT = """
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in [name for name in sys.modules if name.split(".")[0] in {absent!r}]:
    del sys.modules[name]
sys.argv = ["doctor", "--root", {root!r}]
runpy.run_module("experiments.{module}", run_name="__main__")
"""


def run(
    data: Path, absent: Sequence[str] = (), module: str = "doctor", **variables: str
) -> tuple[int, str]:
    """Exit status and output of a module of the experiments without some packages."""
    code = WITHOUT.format(absent=tuple(absent), root=str(data / "images"), module=module)
    own = {"L2L_IMPLICIT_MONGO_TIMEOUT": "1", **variables}
    done = warm_process.run(["-c", code], ROOT, environment(data, **own))
    return done.returncode, done.stdout + done.stderr


def findings(output: str) -> dict[str, str]:
    """The text of each line by its name."""
    lines = [line[2:] for line in output.splitlines() if line.startswith("  ")]
    return {line[:18].strip(): line[19:] for line in lines}


def test_the_extra_is_looked_for_as_a_whole() -> None:
    """Higher and the embedded server have lines of their own; setuptools is Sacred's."""
    parts = ast.parse((ROOT / "setup.py").read_text()).body
    (extras,) = (ast.literal_eval(part.value) for part in parts
                 if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "EXTRAS")
    extra = [re.split("[<>=]", name)[0] for name in extras["experiments"]]
    named = {"pyyaml": "yaml", "higher": "", "SecantusDB": "", "setuptools": ""}
    looked = PACKAGES["experiments"].split()
    assert {named.get(name, name) for name in extra} - {""} == set(looked)


def test_a_whole_installation(tmp_path: Path) -> None:
    (tmp_path / "images/caltech101/101_ObjectCategories").mkdir(parents=True)
    (tmp_path / "images/cifar100.zip").touch()
    status, output = run(tmp_path)
    found = findings(output)
    assert (status, output.splitlines()[-1]) == (0, "Nothing that is needed is broken.")
    assert "BROKEN" not in output
    assert found["answer"] == "embedded, 0 runs, may be written to"
    folder = tmp_path / "mongodb"
    assert found["files"].startswith(f"{folder} (mode 0700")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert found["check"].startswith("-0.1200")
    assert (found["caltech101"], found["cifarfs"]) == ("in place", "in place")
    assert found["omniglot"].startswith("missing: get images_background.zip, images_evaluation.zip")
    assert f"into {tmp_path / 'images/omniglot-py'}" in found["omniglot"]


def test_without_any_extra(tmp_path: Path) -> None:
    status, output = run(tmp_path, EXTRAS)
    found = findings(output)
    assert status == 0, output
    for name in EXTRAS:
        assert found[name.replace("_", "-")].startswith("missing: pip install")
    assert found["pytorch-lightning"] == f"missing: {EXTRA.format('lightning')}"
    assert found["records"].startswith("missing: none without sacred and pymongo: pip install")
    assert found["check"].startswith("-0.1200")
    assert found["fc100"].startswith("missing: get fc100.zip from")


def test_without_torch_and_in_a_folder_of_any_name(tmp_path: Path) -> None:
    status, output = run(tmp_path / "\x1b[31m", TORCH)
    found = findings(output)
    assert "\x1b" not in output and "\\x1b[31m/mongodb (mode 0700" in output
    assert (status, output.splitlines()[-1]) == (1, "7 broken")
    for name in TORCH:
        assert found[name.replace("_", "-")] == f"BROKEN: {LIBRARY}"
    assert found["check"] == "BROKEN: l2l_implicit does not import"
    assert found["answer"] == "embedded, 0 runs, may be written to"


def test_a_database_that_does_not_answer_and_a_url_that_others_can_read(tmp_path: Path) -> None:
    """Quick without torch: nothing of what it blocks has to do with them."""
    url = "mongodb://me:s3cret%2Fw0rd@127.0.0.1:9/runs"
    _, output = run(tmp_path, TORCH, L2L_IMPLICIT_MONGO_URL=url)
    found = findings(output)
    assert output.splitlines()[-1] == "8 broken" and "s3cret" not in output
    assert found["chosen by"] == "L2L_IMPLICIT_MONGO_URL"
    assert found["answer"].startswith("BROKEN: no database answers (L2L_IMPLICIT_MONGO_URL)")
    path = tmp_path / ".config/l2l_implicit/mongo_url"
    path.parent.mkdir(parents=True)
    path.write_text("mongodb://there/name\n")
    path.chmod(0o644)
    _, output = run(tmp_path, TORCH)
    assert output.splitlines()[-1] == "8 broken"
    assert findings(output)["answer"] == (
        f"BROKEN: {path} has mode 0644: others may read it; run chmod 600 {path}"
    )


def test_what_a_section_trips_over_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses, a server that answers nonsense."""
    *_, (name, state, text) = whole(lambda: datasets(Path("x" * 5000)))
    assert (name, state) == ("error", BROKEN) and "File name too long" in text
    with FakeMongod({"count": {"ok": 1, "n": "many"}}) as server:
        monkeypatch.setenv("L2L_IMPLICIT_MONGO_URL", f"mongodb://{server.address}/runs")
        *_, (name, state, text) = whole(database)
    assert (name, state) == ("error", BROKEN) and "many" in text


@pytest.mark.parametrize("words", [
    "tracking.serve", "sweep accuracy --list", "doctor", "train --help",
])  # fmt: skip
def test_a_full_disk_behind_the_output_is_no_traceback(tmp_path: Path, words: str) -> None:
    module, *more = words.split()
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", f"experiments.{module}", *more], cwd=ROOT,
                              env=environment(tmp_path), stdout=full, stderr=subprocess.PIPE,
                              text=True)  # fmt: skip
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert "error: [Errno 28] No space left on device" in done.stderr


@pytest.mark.parametrize("module", ["train", "sweep", "report.__main__", "papers.memory.__main__"])
def test_an_experiment_without_the_extra_says_what_to_install(tmp_path: Path, module: str) -> None:
    status, output = run(tmp_path, EXTRAS, module)
    last = output.splitlines()[-1]
    assert status == 1 and "expected sacred for the experiments" in last
    assert "pip install -r requirements.txt" in last
