"""What must not get out, what must not get in: archives, checkpoints, reports."""

from __future__ import annotations

import hashlib
import io
import pickle
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import Recorder

from experiments.tracking import UserError
from experiments.training import checkpoint
from l2l_implicit.tasks.provide import unpack

pytest_plugins = ("report_fixtures",)

SCRIPT = "<script>alert(1)</script>"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil"])
def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name.replace("/evil", f"{tmp_path}/evil", name.startswith("/evil")), "x")
    unpack(tmp_path / "a.zip", folder, "https://there")
    outside = [p for p in tmp_path.rglob("*") if p.is_file() and folder not in p.parents]
    assert outside == [tmp_path / "a.zip"]


def test_a_link_in_an_archive_leads_nowhere(tmp_path: Path) -> None:
    """A link out of the folder, and then a file through it."""
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, str(outside))
        archive.writestr("link/evil", "x")
    try:
        unpack(tmp_path / "a.zip", folder, "https://there")
    except OSError:
        pass  # "link" is a file by then
    assert not any(outside.iterdir())


class Evil:
    """What a pickle can do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = io.BytesIO()
    torch.save({"steps": Evil()}, content)
    checksum = hashlib.sha256(content.getvalue()).digest()  # whoever writes code writes that too
    (tmp_path / checkpoint.STATE).write_bytes(content.getvalue() + checksum)
    with pytest.raises(UserError, match="expected a checkpoint of this version") as refused:
        checkpoint.load(tmp_path)
    assert "\n" not in str(refused.value) and not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(Evil()))  # which a reader that trusts it does run
    assert (tmp_path / "touched").exists()


def test_the_report_escapes_what_runs_hold(
    recorder: Recorder, report: Callable[..., Path]
) -> None:
    recorder.run(
        {"tasks.name": SCRIPT, SCRIPT: 1, "cell": SCRIPT}, {SCRIPT: {1: 0.5}},
        result={"test_accuracy": 0.5, "diverged": SCRIPT},
        info={"resumes": SCRIPT, "notes": SCRIPT}, meta={"comment": SCRIPT},
        captured_out=SCRIPT, host={"hostname": SCRIPT},
    )  # fmt: skip
    recorder.run({"tasks.name": SCRIPT}, status="FAILED", fail_trace=[SCRIPT], commit=SCRIPT)
    text = (report() / "index.html").read_text(encoding="utf-8")
    assert SCRIPT.lower() not in text.lower() and "<script" not in text.lower()


def test_nothing_here_unpacks_by_other_means() -> None:
    """Every place that unpacks or unpickles is one of those looked at above, or says why it may."""
    root = Path(__file__).parents[3]
    words = "extractall|unpack_archive|tarfile|pickle.load|weights_only=False|allow_pickle=True"
    found = subprocess.run(
        ["grep", "-rnE", words, "--include=*.py", "l2l_implicit", "experiments"],
        cwd=root, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert [line.partition(":")[0] for line in found] == ["l2l_implicit/tasks/provide.py"], found
