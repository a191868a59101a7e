"""`l2l_implicit/_compat.py`, each case in a process of its own: imports cannot be undone."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# `_compat` alone: importing the package would import the real torchvision.
COMPAT = f"""
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location("_compat", {str(ROOT / "l2l_implicit/_compat.py")!r})
_compat = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_compat)
"""

# torchvision in small: it tries its operators, then registers a fake kernel whatever came of it.
PACKAGE = {
    "__init__.py": "from . import extension, _meta_registrations",
    "_meta_registrations.py": """
import torch
register_fake = getattr(torch.library, "register_fake", None) or torch.library.impl_abstract
@register_fake("torchvision::nms")  # its name from torch 2.4 on
def fake(dets, scores, iou_threshold):
    return dets.new_empty(len(dets), dtype=torch.long)
""",
}
NOT_LOADED = "def _has_ops(): return False"
LOADED = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: torch.tensor([7]), "CPU")
def _has_ops(): return True
"""
CALL = "torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"


def run(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a new interpreter, from ``folder``, which comes first in its path."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)


def output(code: str, folder: Path = ROOT) -> str:
    done = run(code, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def small_torchvision(tmp_path: Path) -> Path:
    package = tmp_path / "torchvision"
    package.mkdir()
    for name, source in PACKAGE.items():
        (package / name).write_text(source)
    return package


def test_operators_that_do_not_load_are_declared_without_kernels(small_torchvision: Path) -> None:
    (small_torchvision / "extension.py").write_text(NOT_LOADED)
    code = f"""
import torch
try:
    import torchvision
except RuntimeError as error:
    print(error)
{COMPAT}
import torchvision
try:
    {CALL}
except NotImplementedError as error:
    print(str(error).splitlines()[0])
"""
    before, after = output(code, small_torchvision.parent).splitlines()
    assert before == "operator torchvision::nms does not exist"
    assert after.startswith("Could not run 'torchvision::nms'")


def test_operators_that_load_are_left_alone(small_torchvision: Path) -> None:
    (small_torchvision / "extension.py").write_text(LOADED)
    code = f"{COMPAT}\nimport torchvision\nprint({CALL}.item(), _compat._libraries)"
    assert output(code, small_torchvision.parent) == "7 []"


def test_a_torchvision_that_cannot_tell_is_left_alone(small_torchvision: Path) -> None:
    (small_torchvision / "extension.py").write_text("")
    done = run(f"{COMPAT}\nimport torchvision", small_torchvision.parent)
    assert "operator torchvision::nms does not exist" in done.stderr


def test_without_torchvision_nothing_is_declared_or_imported() -> None:
    code = f"""
{COMPAT}
print(sorted({{"torchvision", "gym", "learn2learn"}} & set(sys.modules)), _compat._libraries)
sys.modules["torchvision"] = None  # as if not installed
try:
    import torchvision
except ModuleNotFoundError:
    print("absent")
"""
    assert output(code) == "[] []\nabsent"


def test_an_operator_declared_by_someone_else_is_not_declared_again() -> None:
    code = f"""
{COMPAT}
other = torch.library.Library("torchvision", "DEF")
other.define(_compat._SCHEMAS["nms"])
print(_compat.declare_missing_operators(), _compat.declare_missing_operators())
"""
    assert output(code) == "('qnms',) ()"


def test_the_library_imports_quietly_and_a_called_operator_is_right_or_says_why_not() -> None:
    """It loads no experiment; of the extras learn2learn itself loads pytorch_lightning."""
    done = run("""
import l2l_implicit, learn2learn, sys, torch, torchvision.transforms, torchvision.datasets
bad = {"experiments", "sacred", "pymongo", "higher", "l2l_implicit.lightning"}
print(sorted(bad & set(sys.modules)))
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1], [5.0, 5.0, 6.0, 6.0]])
try:
    print(torchvision.ops.nms(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.5).tolist())
except RuntimeError as error:
    print(str(error).splitlines()[0])
""")
    assert (done.returncode, done.stderr) == (0, "")
    loaded, printed = done.stdout.splitlines()
    assert loaded == "[]"
    assert printed == "[1, 2]" or printed.startswith("Couldn't load custom C++ ops.")
