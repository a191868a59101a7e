"""learn2learn's five benchmarks where data is packed, missing, damaged or incomplete."""

import l2l_implicit  # noqa: F401, I001  (first: it makes learn2learn importable)

import shutil
import zipfile
from pathlib import Path
from typing import Any

import learn2learn
import pytest
from pytest import MonkeyPatch
from disk_formats import WRITERS
from small_benchmarks import made, no_network

from experiments.tracking import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*results do not compare:UserWarning")


@pytest.fixture
def attempts(monkeypatch: MonkeyPatch) -> list[Any]:
    """No network at all; what was tried."""
    return no_network(monkeypatch)


@pytest.mark.parametrize(("name", "top", "archive"), [
    ("cifarfs", "cifarfs/cifar100", "cifar100.zip"),
    ("omniglot", "omniglot-py/images_background", "omniglot-py/images_background.zip"),
    ("fc100", "", "fc100.zip"),
])  # fmt: skip
def test_archives_are_unpacked(
    name: str, top: str, archive: str, tmp_path: Path, attempts: list[Any]
) -> None:
    WRITERS[name](tmp_path, 4, 3)
    base = (tmp_path / top).parent if top else tmp_path
    packed = sorted(path for path in (tmp_path / top).rglob("*") if path.is_file())
    with zipfile.ZipFile(tmp_path / archive, "w") as file:
        for path in packed:
            file.write(path, path.relative_to(base))
            path.unlink()
    if top:
        shutil.rmtree(tmp_path / top)
    made(name, tmp_path).stream("test", 0).sample()
    assert all(path.exists() for path in packed) and attempts == []
    assert not list(tmp_path.rglob(".unpacking*"))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cifarfs", ["cifar100.zip from https://zenodo.org/record/7978538/files into ROOT"]),
        ("fc100", ["fc100.zip from https://zenodo.org/record/7978538/files into ROOT"]),
        ("mini-imagenet", ["mini-imagenet-cache-test.pkl", "zenodo.org", "into ROOT"]),
        ("tiered_imagenet", ["train_labels.pkl", "zenodo.org", "into ROOT/tiered-imagenet"]),
        ("omniglot", ["images_background.zip, images_evaluation.zip", "into ROOT/omniglot-py",
                      "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"]),
        ("caltech101", ["caltech-101.zip", "CaltechDATA", "ROOT/caltech101/101_ObjectCategories"]),
    ],
)
def test_without_a_network_the_error_says_what_belongs_where(
    name: str, parts: list[str], tmp_path: Path, attempts: list[Any]
) -> None:
    with pytest.raises(UserError) as raised:
        made(name, tmp_path / "data")
    message = str(raised.value)
    assert attempts and "\n" not in message and f"tasks.name={name}: expected" in message
    for part in parts:
        assert part.replace("ROOT", str(tmp_path / "data")) in message
    assert [path for path in (tmp_path / "data").rglob("*") if path.is_file()] == []


def test_half_a_download_is_removed(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """An error page in place of the data, as a proxy or a moved address sends it."""
    module = learn2learn.vision.datasets.mini_imagenet

    def page(source: str, destination: str, size: int | None = None) -> None:
        Path(destination).write_text("<html>404</html>")

    monkeypatch.setattr(module, "download_file", page)
    monkeypatch.setattr(module, "download_file_from_google_drive", page)
    with pytest.raises(UserError, match="could not download it .UnpicklingError.: get mini"):
        made("mini_imagenet", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "file"), [
    ("fc100", "FC100_val.pickle"), ("mini_imagenet", "mini-imagenet-cache-train.pkl"),
    ("tiered_imagenet", "tiered-imagenet/test_images_png.pkl"), ("fc100", "fc100.zip"),
])  # fmt: skip
def test_damaged_files_stay(name: str, file: str, tmp_path: Path, attempts: list[Any]) -> None:
    if file.endswith(".zip"):
        (tmp_path / file).write_bytes(b"PK\x03\x04 cut short")
    else:
        WRITERS[name](tmp_path, 3, 3)
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"(not read it \(\w+.*\)|got .*): delete it,? and") as told:
        made(name, tmp_path)
    assert file in str(told.value) and (tmp_path / file).exists() and attempts == []


def test_an_interrupted_copy_leaves_nothing(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    WRITERS["cifarfs"](tmp_path, 4, 5)
    copied: list[str] = []

    def stop(source: str, target: str) -> None:
        copied.append(target)
        Path(target).mkdir()
        if len(copied) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", stop)
        made("cifarfs", tmp_path)
    assert [path.name for path in (tmp_path / "cifarfs").iterdir()] == ["cifar100"]
    assert made("cifarfs", tmp_path).describe()["samples"]["train"] == 20


def test_classes_missing_from_the_copy_of_cifarfs_are_noticed(tmp_path: Path) -> None:
    WRITERS["cifarfs"](tmp_path, 4, 5)
    made("cifarfs", tmp_path)
    shutil.rmtree(tmp_path / "cifarfs" / "processed" / "train" / "train_02")
    with pytest.raises(UserError, match="processed/train, could .* 3 classes where .*train.txt"):
        made("cifarfs", tmp_path)


def test_labels_of_earlier_data_do_not_survive(tmp_path: Path) -> None:
    """learn2learn keeps lists of labels in the root and never looks whether they still fit."""
    for classes in (3, 5):
        WRITERS["fc100"](tmp_path, classes, 3)
        benchmark = made("fc100", tmp_path)
        assert benchmark.describe()["classes"]["train"] == classes
    assert not list(tmp_path.glob("*bookkeeping*"))


@pytest.mark.filterwarnings("default")
def test_a_part_of_the_data_is_told(tmp_path: Path) -> None:
    WRITERS["fc100"](tmp_path, 4, 5)
    with pytest.warns(UserWarning, match=r"fc100: expected \(\(60, 36000\), .* found \(\(4, 20\)"):
        made("fc100", tmp_path)
