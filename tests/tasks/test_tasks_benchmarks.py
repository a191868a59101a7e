"""learn2learn's five benchmarks on small data in the real formats, whole, packed or damaged."""

import l2l_implicit  # noqa: F401, I001  (first: it makes learn2learn importable)

import io
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learn2learn
import numpy as np
import pytest
import torch
from disk_formats import WRITERS
from PIL import Image
from pytest import MonkeyPatch
from small_benchmarks import made, no_network
from torch.nn import functional as F
from torchvision import transforms

from experiments.tracking import UserError
from l2l_implicit.tasks import get_tasksets, learn2learn_benchmarks, split_support_query
from l2l_implicit.tasks.omniglot import SHARES
from l2l_implicit.tasks.tasksets import draw_modes

FIVE = ("cifarfs", "fc100", "mini_imagenet", "tiered_imagenet", "omniglot")
SIDES = dict(zip(FIVE, (32, 32, 84, 84, 28), strict=True))
SIZES = {"train_ways": 3, "train_samples": 4, "test_ways": 3, "test_samples": 4}

pytestmark = pytest.mark.filterwarnings("ignore:.*results do not compare:UserWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five, four classes (omniglot: 68 characters) of five images."""
    root = tmp_path_factory.mktemp("data")
    for name in FIVE:
        WRITERS[name](root, 4, 5)
    return root


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No network at all; what was tried."""
    return no_network(monkeypatch)


@pytest.mark.parametrize("name", FIVE)
def test_every_mode_gives_tasks_offline(name: str, data: Path, attempts: list[Any]) -> None:
    benchmark = made(name, data, test_ways=4, test_queries=3)
    shape = (1 if name == "omniglot" else 3, SIDES[name], SIDES[name])
    for mode, (ways, shots, queries) in (("train", (3, 1, 2)), ("test", (4, 1, 3))):
        assert benchmark.sizes(mode) == (ways, shots, queries)
        episode = benchmark.stream(mode, 0).sample()
        assert episode.inputs.shape == (ways * (shots + queries), *shape)
        assert episode.inputs.dtype == torch.float32
        assert 0 <= episode.inputs.min() < 0.5 < episode.inputs.max() <= 1
        assert episode.support_targets.tolist() == list(range(ways))
        assert episode.query_targets.bincount().tolist() == [queries] * ways
    assert benchmark.input_shape() == shape and attempts == []
    assert benchmark.stream("validation", 0).sample().query_targets.dtype == torch.int64


@pytest.mark.parametrize("name", FIVE[:4])
def test_tasks_are_those_of_learn2learn(name: str, data: Path, tmp_path: Path) -> None:
    """Bit for bit, where its own loader is right: it gets a copy, as it writes into the root."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    own = {"data_augmentation": "normalize"} if "imagenet" in name else {}
    theirs = learn2learn.vision.benchmarks.get_tasksets(
        name.replace("_", "-"), root=str(copy), **SIZES, **own
    )
    ours = get_tasksets(name, root=str(data), **SIZES)
    for mode in ("train", "validation", "test"):
        expected, found = (_seeded(getattr(sets, mode)) for sets in (theirs, ours))
        assert torch.equal(expected[0], found[0]) and torch.equal(expected[1], found[1])


def _seeded(taskset: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Support images and labels; in validation learn2learn does not order the classes."""
    random.seed(7)
    return split_support_query(*taskset.sample(), shots=3)[0]


@pytest.mark.parametrize("name", FIVE[:4])
def test_training_images_alone_are_changed(name: str, data: Path) -> None:
    """Anew each time, by torch's generator alone; the tasks stay the same."""
    plain = get_tasksets(name, root=str(data), **SIZES)
    sets = get_tasksets(name, root=str(data), data_augmentation="lee2019", **SIZES)
    for mode in ("validation", "test"):
        assert torch.equal(*(_seeded(getattr(of, mode))[0] for of in (plain, sets)))
    torch.manual_seed(0)
    (one, labels), (two, same) = _seeded(sets.train), _seeded(sets.train)
    assert torch.equal(labels, same) and torch.equal(labels, _seeded(plain.train)[1])
    assert one.shape == two.shape and not torch.equal(one, two)
    assert 0 <= one.min() and one.max() <= 1
    torch.manual_seed(0)
    assert torch.equal(one, _seeded(sets.train)[0])


def test_crops_and_mirrorings_move_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other colours: every image is a window of the padded one, mirrored or not."""
    monkeypatch.setattr(learn2learn_benchmarks.transforms, "ColorJitter",
                        lambda **how: lambda image: image)  # fmt: skip
    image, side = torch.arange(1, 1 + 3 * 32 * 32).reshape(3, 32, 32), 32
    padded, change = F.pad(image, (4, 4, 4, 4)), learn2learn_benchmarks.lee2019(side)
    windows = {
        (top, left, turn): w.flip(-1) if turn else w
        for top in range(9) for left in range(9) for turn in (False, True)
        for w in [padded[:, top : top + side, left : left + side]]
    }  # fmt: skip
    found = {next(key for key, w in windows.items() if torch.equal(w, changed))
             for changed in (change(image) for _ in range(60))}  # fmt: skip
    assert len({key[:2] for key in found}) > 10 and {key[2] for key in found} == {False, True}


@pytest.mark.parametrize("name", FIVE)
def test_classes_of_the_modes_are_disjoint(name: str, data: Path) -> None:
    sets = get_tasksets(name, root=str(data), **SIZES)
    names = [set(getattr(sets, mode).dataset.dataset.classes) for mode in sets._fields]
    if name in ("fc100", "tiered_imagenet"):  # their labels are numbers that start anew
        every = [getattr(sets, mode).dataset for mode in sets._fields]
        images = [{of[n][0].numpy().tobytes() for n in range(len(of))} for of in every]
        assert not images[0] & images[2] and not images[1] & images[2]
    else:
        assert len(set.union(*names)) == sum(map(len, names))


@pytest.mark.parametrize("name", FIVE)
def test_images_on_a_device_are_the_same(name: str, data: Path) -> None:
    plain, moved = (get_tasksets(name, root=str(data), device=device, **SIZES).train
                    for device in (None, "cpu"))  # fmt: skip
    random.seed(1)
    expected = plain.sample()[0]
    random.seed(1)
    assert torch.equal(moved.sample()[0], expected)
    first, again = moved.dataset[0][0], moved.dataset[0][0]
    assert first.data_ptr() == again.data_ptr()  # a view of the table that lies on the device


@pytest.mark.parametrize("name", FIVE)
def test_python_random_alone_decides_and_is_left_alone(name: str, data: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    first = made(name, data).stream("train", 4).sample()
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    second, other = (made(name, data).stream("train", seed).sample() for seed in (4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.inputs, other.inputs)


def test_omniglot_split_depends_on_its_seed_alone(data: Path) -> None:
    def names(seed: int | None) -> list[str]:
        return made("omniglot", data, split_seed=seed).sets.test.dataset.dataset.classes

    random.seed(3)
    first = names(None)
    random.seed(4)
    assert names(0) == first and names(1) != first
    assert made("omniglot", data).describe()["notes"]["test"] == {"split_seed": 0}


def test_omniglot_split_has_the_sizes_of_the_benchmark() -> None:
    split = draw_modes(range(1623), SHARES, seed=5)
    assert [len(split[mode]) for mode in ("train", "validation", "test")] == [1100, 100, 423]
    assert sorted(label for labels in split.values() for label in labels) == list(range(1623))


def test_omniglot_images_are_those_of_learn2learn(data: Path) -> None:
    """Those that the transforms of its benchmark give."""
    sets = get_tasksets("omniglot", root=str(data), train_samples=5, test_samples=5, test_ways=2)
    table = sets.train.dataset.dataset
    name = table.classes[2].split("/")
    files = sorted((data / "omniglot-py").glob(f"*/{name[0]}/{name[1]}/*_01.png"))
    small = transforms.Resize(28, interpolation=Image.LANCZOS)
    drawn = [1.0 - transforms.ToTensor()(small(Image.open(path).convert("L"))) for path in files]
    image = table[table.labels_to_indices[2][0]][0]
    assert any(torch.allclose(image, expected, atol=1e-6) for expected in drawn)
    assert image.mean() < 0.5 < image.max()  # white strokes on black


def test_each_class_of_a_task_has_a_rotation_of_its_own(data: Path) -> None:
    """learn2learn 0.2.0 turns all classes as the last one: here they differ in most tasks."""
    sets = get_tasksets("omniglot", root=str(data), **{**SIZES, "train_ways": 4})
    table = sets.train.dataset.dataset
    upright = {index: table[index][0] for index in range(len(table))}
    random.seed(0)
    different = 0
    for _ in range(5):
        turns: dict[int, set[int]] = {}
        for image, label in zip(*sets.train.sample(), strict=True):
            turns.setdefault(int(label), set()).update(_turns(image, upright))
        assert all(len(found) == 1 for found in turns.values())
        different += len(set.union(*turns.values())) > 1
    assert different >= 4


def _turns(image: torch.Tensor, upright: dict[int, torch.Tensor]) -> set[int]:
    return {turn for original in upright.values() for turn in range(4)
            if torch.equal(torch.rot90(original, turn, dims=(-2, -1)), image)}  # fmt: skip


@pytest.mark.parametrize(("name", "options", "message"), [
    ("tiered_imagenet", {"augmentation": "norm"}, "'normalize', 'lee2019', got 'norm'"),
    ("cifarfs", {"augmentation": "normalize"}, "one of 'lee2019', got 'normalize'"),
    ("cifarfs", {"split_seed": 1}, "got split_seed=1"),
    ("fc100", {"level": "easy"}, "got level='easy'"),
    ("fc100", {"ways": 5}, "train_ways between 1 and 4, the number of train classes, got 5"),
    ("fc100", {"queries": 5}, r"train_samples between 1 and 5, .* train class \(0\), got 6"),
    ("fc10", {}, "got 'fc10'; did you mean 'fc100'"),
])  # fmt: skip
def test_what_a_benchmark_cannot_do(name: str, options: Any, message: str, data: Path) -> None:
    with pytest.raises(UserError, match=f"tasks.name={name}: .*expected .*{message}") as raised:
        made(name, data, **options)
    assert "\n" not in str(raised.value)


# Where data is packed, missing, damaged or incomplete.


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


@pytest.mark.parametrize(("name", "parts"), [
    ("cifarfs", ["cifar100.zip from https://zenodo.org/record/7978538/files into ROOT"]),
    ("fc100", ["fc100.zip from https://zenodo.org/record/7978538/files into ROOT"]),
    ("mini-imagenet", ["mini-imagenet-cache-test.pkl", "zenodo.org", "into ROOT"]),
    ("tiered_imagenet", ["train_labels.pkl", "zenodo.org", "into ROOT/tiered-imagenet"]),
    ("omniglot", ["images_background.zip, images_evaluation.zip", "into ROOT/omniglot-py",
                  "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"]),
    ("caltech101", ["caltech-101.zip", "CaltechDATA", "ROOT/caltech101/101_ObjectCategories"]),
])  # fmt: skip
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


def small_png(*size: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "png")
    return file.getvalue()


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def runs(path: Path) -> None:
    """It makes a folder as soon as the file is read."""
    path.write_bytes(f"c{os.name}\nmkdir\n(V{path.parent / 'made'}\ntR.".encode())


def changed(key: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        content = pickle.loads(path.read_bytes())
        path.write_bytes(pickle.dumps({**content, key: change(content[key])}))

    return write


@pytest.mark.parametrize(("name", "file", "damage", "words"), [
    ("fc100", "FC100_val.pickle", half, ""), ("fc100", "FC100_val.pickle", device, "no regular"),
    ("fc100", "FC100_val.pickle", changed("labels", lambda labels: labels[1:]), "8 labels for"),
    ("fc100", "FC100_val.pickle", changed("labels", lambda labels: [0.5, *labels[1:]]), "'float'"),
    ("fc100", "FC100_val.pickle", changed("data", lambda data: data / 255), "images of .*float64"),
    ("mini_imagenet", "mini-imagenet-cache-train.pkl", half, ""),
    ("mini_imagenet", "mini-imagenet-cache-train.pkl",
     changed("image_data", lambda data: data.astype(int)), "images of .*int64"),
    ("tiered_imagenet", "tiered-imagenet/test_images_png.pkl", half, ""),
    ("tiered_imagenet", "tiered-imagenet/test_labels.pkl",
     changed("label_specific", lambda labels: labels[1:]), "8 labels for 9 images"),
    *((name, file, runs, f"asks for {os.name}.mkdir, not for arrays alone") for name, file in (
        ("fc100", "FC100_val.pickle"), ("mini_imagenet", "mini-imagenet-cache-train.pkl"),
        ("tiered_imagenet", "tiered-imagenet/test_images_png.pkl"),
        ("tiered_imagenet", "tiered-imagenet/test_labels.pkl"),
    )),
])  # fmt: skip
def test_damaged_files_stay(
    name: str, file: str, damage: Any, words: str, tmp_path: Path, attempts: list[Any]
) -> None:
    """And run nothing; learn2learn's own classes read as ever afterwards."""
    WRITERS[name](tmp_path, 3, 3)
    damage(tmp_path / file)
    match = rf"not read it \(\w+: .*{words}.*\): delete it, and"
    with pytest.raises(UserError, match=match) as told:
        made(name, tmp_path)
    assert file in str(told.value) and (tmp_path / file).exists() and attempts == []
    assert not list(tmp_path.rglob("made"))
    assert learn2learn.vision.datasets.fc100.pickle is pickle


def test_a_damaged_archive_stays(tmp_path: Path, attempts: list[Any]) -> None:
    (tmp_path / "fc100.zip").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UserError, match="zip archive in .*fc100.zip, got .*: delete it and get it"):
        made("fc100", tmp_path)
    assert (tmp_path / "fc100.zip").exists() and attempts == []


@pytest.mark.parametrize(("content", "words"), [
    (b"text", "cannot identify image file it: remove"), (b"BM" + bytes(60), ""),
    (small_png(20, 30), "20 x 30 pixels instead of 84 x 84"),
])  # fmt: skip
def test_an_unreadable_stored_picture_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    WRITERS["tiered_imagenet"](tmp_path, 3, 3)
    stored = tmp_path / "tiered-imagenet" / "train_images_png.pkl"
    stored.write_bytes(pickle.dumps([content] * 9))
    with pytest.raises(UserError, match=rf"in tiered-imagenet/train/\d, got {words}"):
        made("tiered_imagenet", tmp_path).stream("train", 0).sample()


@pytest.mark.parametrize(("name", "instead"), [
    ("cifarfs", "a FIFO"),  # torchvision sees none of omniglot's
    ("cifarfs", "another size"),  # omniglot's are made smaller
    *((name, instead) for name in ("cifarfs", "omniglot") for instead in ("half", "many pixels")),
])  # fmt: skip
def test_a_picture_that_cannot_be_read_is_named_or_its_task_left_out(
    name: str, instead: str, tmp_path: Path
) -> None:
    """Pictures are read when a task first asks for them: a run may be hours old by then."""
    some = {"cifarfs": "cifarfs/processed/train/train_00/*", "omniglot": "*/*/*/*/*[02468]_*"}[name]
    WRITERS[name](tmp_path, 4, 3)
    made(name, tmp_path)
    for path in tmp_path.glob(some):
        content = path.read_bytes()
        path.unlink()
        if instead == "a FIFO":
            os.mkfifo(path)
        elif instead == "half":
            path.write_bytes(content[: len(content) // 2])
        else:
            side = 40 if instead == "another size" else 5000
            Image.new("L", (side, side)).save(path)
    said: list[str] = []
    stream = made(name, tmp_path).stream("train", 0, skip=True, say=said.append)
    for _ in range(10):
        assert stream.sample().inputs.isfinite().all()
    assert stream.skipped == len(said) > 0
    stream.skip = False
    with pytest.raises(UserError, match=r"^train task \d+: expected a picture .*\.png, got .*"):
        while True:
            stream.sample()
    assert all(str(tmp_path) in text and "\n" not in text for text in said)


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
