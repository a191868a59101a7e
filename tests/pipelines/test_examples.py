"""learn2learn's example scripts, and what the diffs of docs/examples.md make of them."""

import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk_formats import WRITERS

import l2l_implicit  # noqa: F401  (makes learn2learn importable)

import torchvision  # isort: skip

PAGE = Path(__file__).parents[2] / "docs" / "examples.md"
Hunk = tuple[str, str]  # the lines before, the lines after


def read_diffs() -> dict[str, list[Hunk]]:
    """The hunks for each script that the page names."""
    found: dict[str, list[Hunk]] = {}
    for block in re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S):
        name = block.splitlines()[0].removeprefix("--- ").removesuffix(".py")
        bodies = re.split(r"^@@.*@@\n", block, flags=re.M)[1:]
        found[name] = [(side(body, "+"), side(body, "-")) for body in bodies]
    return found


def side(body: str, other: str) -> str:
    """The lines of one side of a hunk: all but those of the other."""
    kept = [line[1:] for line in body.splitlines() if not line.startswith(other)]
    return "\n".join(kept) + "\n"


def patched(text: str, hunks: list[Hunk]) -> str:
    """The text with each hunk applied, wherever its lines stand; they must stand there once."""
    for before, after in hunks:
        assert text.count(before) == 1, f"{text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    return text


def added_lines(hunks: list[Hunk]) -> list[str]:
    """What a user types."""
    pairs = [(before.splitlines(), after.splitlines()) for before, after in hunks]
    return [line for before, after in pairs for line in after if line not in before]


DIFFS = read_diffs()
SCRIPTS = {name: f"{name}.py" for name in DIFFS} | dict.fromkeys(
    ("maml_omniglot", "maml_miniimagenet"), "maml.py"
)
VERSIONS = ("original", "changed")
SMALL = {"ways": 2, "shots": 1, "cuda": False}
LIGHT = {**SMALL, "meta_batch_size": 1, "num_iterations": 1}
OPTIONS = {"ways": 2, "shots": 2, "seed": 0, "dataset": "fc100", "iterations": 4, "lr": 0.01,
           "batch_size": 12, "eval_freq": 3}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {  # of a script's main
    "anil_fc100": {**SMALL, "meta_bsz": 2, "iters": 2},
    "anilkfo_cifarfs": LIGHT,
    "maml_omniglot": LIGHT,
    "maml_miniimagenet": {**LIGHT, "adaptation_steps": 2},
}
DATASETS = {"maml_omniglot": ["omniglot"], "maml_miniimagenet": ["mini-imagenet"]}
pytestmark = [
    pytest.mark.usefixtures("data"),
    pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning"),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scripts look for ~/data: four classes of six images in each format."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("fc100", "cifarfs", "mini_imagenet", "omniglot"):
        WRITERS[name](folder / "data", 4, 6)
    return folder


@pytest.fixture
def data(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(home))
    # It asks for the checksums of the archives, of which there are none.
    monkeypatch.setattr(torchvision.datasets.Omniglot, "_check_integrity", lambda self: True)


def script(name: str, version: str, folder: Path = Path(__file__).parent) -> dict[str, Any]:
    """The names that a script defines, in one version or the other."""
    path = folder / SCRIPTS[name]
    text = path.read_text("utf-8")
    code = patched(text, DIFFS[name]) if version == "changed" else text
    names: dict[str, Any] = {"__name__": name}
    exec(compile(code, str(path), "exec"), names)
    return names


def learned(parameters: Iterable[torch.nn.Parameter]) -> bool:
    return all(bool(p.grad.any()) for p in parameters)


def factors(update: Any) -> list[torch.nn.Parameter]:
    return [part.transform.left for part in update.transforms_modules]


# What has learned of a script's modules, by version.
LEARNED: dict[str, Callable[[dict[str, Any], str], bool]] = {
    # The initial head: by unrolling; of no influence on a solved problem.
    "anil_fc100": lambda found, version: learned(
        p for p in found["features"].parameters() if p.dim() == 4
    ) and {bool(p.grad.any()) for p in found["head"].parameters()} == {version == "original"},
    "anilkfo_cifarfs": lambda found, _: learned(factors(found["update"])) and not any(
        torch.equal(left, torch.eye(len(left))) for left in factors(found["update"])),
    "maml_omniglot": lambda found, _: learned(p for p in found["maml"].parameters() if p.dim() > 1),
    "supervised_pretraining": lambda found, _: found["accuracies"][-1] >= 0.75,
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_runs_and_learns(name: str, version: str) -> None:
    names = script(name, version)
    if name in SETTINGS:
        errors, modules = names["main"](*DATASETS.get(name, []), **SETTINGS[name])
    else:
        errors, modules = names["pretrain"](Namespace(options=Namespace(**OPTIONS)))
    assert len(errors) > 0 and np.isfinite(errors).all()
    for module in modules.values():
        if isinstance(module, torch.nn.Module):
            assert all(torch.isfinite(p).all() for p in module.parameters())
    assert name not in LEARNED or LEARNED[name](modules, version)


def test_every_script_has_its_diff_and_a_diff_is_short() -> None:
    assert set(DIFFS) == {*SETTINGS, "supervised_pretraining"}
    for hunks in DIFFS.values():
        imports = [line for line in added_lines(hunks) if line.startswith("from l2l_implicit")]
        assert len(imports) == 1 and len(added_lines(hunks)) <= 3


def test_the_python_blocks_of_the_page_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert blocks
    for block in blocks:
        names: dict[str, Any] = {"torch": torch}
        exec(compile(block, str(PAGE), "exec"), names)
        assert bool(names["features"][0].weight.grad.any())


# learn2learn's own files, where they are at hand.

UPSTREAM = os.environ.get("LEARN2LEARN_EXAMPLES", "")
AT_HAND = pytest.mark.skipif(not UPSTREAM, reason="LEARN2LEARN_EXAMPLES: no folder named")


@pytest.mark.slow
@AT_HAND
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_real_script_runs(
    name: str, version: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SCRIPTS, name, f"{name}.py")
    script(name, version, Path(UPSTREAM))["main"](**SETTINGS[name])
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if "Error" in line]
    assert printed and np.isfinite([float(words[-1]) for words in printed]).all()


@pytest.mark.slow
@AT_HAND
def test_the_real_pretraining_script_is_still_the_one_that_the_diff_is_of() -> None:
    """It imports wandb, kornia and simple_parsing, so it is not run here."""
    text = (Path(UPSTREAM) / "supervised_pretraining.py").read_text("utf-8")
    compile(patched(text, DIFFS["supervised_pretraining"]), "supervised_pretraining.py", "exec")
