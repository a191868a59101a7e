"""What must not get out, what must not get in: archives, checkpoints."""

import hashlib
import io
import pickle
import subprocess
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.tracking import UserError
from experiments.training import checkpoint
from l2l_implicit.tasks.provide import unpack


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "..\\evil", "link/evil"])
def test_an_archive_writes_nothing_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    """Nor through a link that it brings."""
    folder, outside = tmp_path / "deep" / "folder", tmp_path / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, str(outside))
        archive.writestr(name.replace("/evil", f"{tmp_path}/evil", name.startswith("/evil")), "x")
    with suppress(*[OSError] * name.startswith("link")):  # a file by then
        unpack(tmp_path / "a.zip", folder, "https://there")
    left = [p for p in tmp_path.rglob("*") if p.is_file() and folder not in p.parents]
    assert left == [tmp_path / "a.zip"]


def test_a_damaged_archive_is_one_line(tmp_path: Path) -> None:
    """Whatever byte of it is another one."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/a", bytes(range(99)))
    whole, path = content.getvalue(), tmp_path / "a.zip"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        with suppress(ValueError, OSError):  # or it is a part that does not matter
            unpack(path, tmp_path / "out", "https://there")


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


def test_a_packed_checkpoint_is_refused_before_it_becomes_large(tmp_path: Path) -> None:
    content, packed = io.BytesIO(), io.BytesIO()
    torch.save({"steps": torch.zeros(2**20)}, content)
    assert len(checkpoint.plain_data(content.getvalue())["steps"]) == 2**20
    with zipfile.ZipFile(content) as parts, zipfile.ZipFile(packed, "w", 8) as small:
        for part in parts.infolist():
            small.writestr(part.filename, parts.read(part))
    assert len(packed.getvalue()) < 2**14
    with pytest.raises(ValueError, match="it is packed, and larger in memory"):
        checkpoint.plain_data(packed.getvalue())
    checksum = hashlib.sha256(packed.getvalue()).digest()
    (tmp_path / checkpoint.STATE).write_bytes(packed.getvalue() + checksum)
    with pytest.raises(UserError, match="it is packed, and larger in memory; start anew"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("tensor", [
    torch.zeros(1).expand(2**40),
    torch.sparse_coo_tensor(torch.zeros(1, 1).long(), [1.0], [2**40], check_invariants=True),
])  # fmt: skip
def test_a_tensor_larger_than_its_file_is_refused(tensor: torch.Tensor) -> None:
    content = io.BytesIO()
    torch.save({"steps": [(tensor,)]}, content)
    assert len(content.getvalue()) < 2**14
    with pytest.raises(ValueError, match="larger than what is stored of it"):
        checkpoint.plain_data(content.getvalue())


def test_nothing_here_unpacks_by_other_means() -> None:
    """Every place that unpacks or unpickles is one of those looked at above, or says why it may."""
    root = Path(__file__).parents[3]
    words = "extractall|unpack_archive|tarfile|pickle.load|weights_only=False|allow_pickle=True"
    found = subprocess.run(
        ["grep", "-rnE", words, "--include=*.py", "l2l_implicit", "experiments"],
        cwd=root, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert [line.partition(":")[0] for line in found] == ["l2l_implicit/tasks/provide.py"], found
