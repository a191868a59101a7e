"""`l2l_implicit/_compat.py`, each case in a process of its own: imports cannot be undone."""

import subprocess
import sys
from pathlib import Path

import pytest
from warm_process import run

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
REFUSED = "operator torchvision::nms does not exist"


def tried(code: str) -> str:
    """Runs ``code`` and prints the first line of its error."""
    body = "\n    ".join(code.strip().splitlines())
    return f"try:\n    {body}\nexcept Exception as e:\n    print(str(e).splitlines()[0])\n"


# What the small torchvision's operators are, the code, and what it prints; the last two without it.
CASES: dict[str, tuple[str | None, str, str]] = {
    "operators that do not load are declared without kernels": (
        NOT_LOADED, f"import torch\n{tried('import torchvision')}{COMPAT}\nimport torchvision\n"
        + tried(CALL), f"{REFUSED}\nCould not run 'torchvision::nms'"),
    "operators that load are left alone": (
        LOADED, f"{COMPAT}\nimport torchvision\nprint({CALL}.item(), _compat._libraries)", "7 []"),
    "without torchvision nothing is declared or imported": (
        None, COMPAT + """
print(sorted({"torchvision", "gym", "learn2learn"} & set(sys.modules)), _compat._libraries)
sys.modules["torchvision"] = None  # as if not installed
""" + tried("import torchvision"), "[] []\nimport of torchvision halted"),
    "an operator declared by someone else is not declared again": (
        None, COMPAT + """
other = torch.library.Library("torchvision", "DEF")
other.define(_compat._SCHEMAS["nms"])
print(_compat.declare_missing_operators(), _compat.declare_missing_operators())
""", "('qnms',) ()"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str, tmp_path: Path) -> None:
    operators, code, expected = CASES[case]
    if operators is not None:
        (tmp_path / "torchvision").mkdir()
        for name, source in {**PACKAGE, "extension.py": operators}.items():
            (tmp_path / "torchvision" / name).write_text(source)
    done = run(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert len(printed) == len(expected.splitlines())
    assert all(map(str.startswith, printed, expected.splitlines())), printed


IMPORTS = """
import l2l_implicit, learn2learn, sys, torch, torchvision.transforms, torchvision.datasets
bad = {"experiments", "sacred", "pymongo", "higher", "l2l_implicit.lightning"}
print(sorted(bad & set(sys.modules)))
boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1], [5.0, 5.0, 6.0, 6.0]])
"""
NMS = tried("print(torchvision.ops.nms(boxes, torch.tensor([0.8, 0.9, 0.7]), 0.5).tolist())")


def test_the_library_imports_quietly_and_a_called_operator_is_right_or_says_why_not() -> None:
    """It loads no experiment; of the extras learn2learn itself loads pytorch_lightning."""
    command = [sys.executable, "-c", IMPORTS + NMS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert (done.returncode, done.stderr) == (0, "")
    loaded, printed = done.stdout.splitlines()
    assert loaded == "[]"
    assert printed == "[1, 2]" or printed.startswith("Couldn't load custom C++ ops.")
