"""Glyphs: the embedded array, its distortions pixel by pixel, and how hard the levels are."""

import hashlib
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

import l2l_implicit  # noqa: F401  (first: it makes learn2learn importable)
from experiments.build_glyphs.classes import random_split, script_of, script_split
from l2l_implicit.tasks import Glyphs
from l2l_implicit.tasks.glyph_distortions import LEVELS, Warp
from l2l_implicit.tasks.glyphs import PATH, glyph_arrays
from l2l_implicit.tasks.tasksets import MODES

# SHA-256 of glyphs.npz, and of the uint8 images of Glyphs("test", level=...): another value means
# other data for every user.
FILE = "7516ca8031285b9d0b9f609b4a40b000b1102493526f256a3650513e7c6ff80f"
PIXELS = ("21bc7fecf49e852a", "6133e2b4227b41d7", "9307848323042d35", "6049c54f08b12c54")
ARRAYS = glyph_arrays()


def test_array_is_small_and_complete() -> None:
    assert PATH.stat().st_size <= 4.5e6
    assert hashlib.sha256(PATH.read_bytes()).hexdigest() == FILE
    assert ARRAYS["images"].shape[1:] == (28, 28) and ARRAYS["images"].dtype == np.uint8
    assert len(ARRAYS["labels"]) == len(ARRAYS["faces"]) == len(ARRAYS["images"])
    assert len(ARRAYS["codepoints"]) == len(ARRAYS["scripts"]) == ARRAYS["labels"].max() + 1 == 536
    assert (ARRAYS["images"].max((1, 2)) > 40).all() and not ARRAYS["images"].flags.writeable
    characters = [chr(point) for point in ARRAYS["codepoints"]]
    assert len(set(characters)) == len(characters)  # and none is composed of others
    assert all(len(unicodedata.normalize("NFKD", character)) == 1 for character in characters)


def test_splits_are_disjoint_and_those_of_the_build_script() -> None:
    scripts = [script_of(point) for point in ARRAYS["codepoints"].tolist()]
    assert scripts == ARRAYS["scripts"].tolist()
    made = {"random": random_split(len(scripts)), "script": script_split(scripts)}
    for split, sizes in (("random", [343, 85, 108]), ("script", [231, 66, 105])):
        parts = [ARRAYS[f"split_{split}_{mode}"].tolist() for mode in MODES]
        assert parts == [made[split][mode] for mode in MODES]
        assert [len(set(part)) for part in parts] == sizes
        assert len(set().union(*parts)) == sum(sizes)
    found = [set(ARRAYS["scripts"][ARRAYS[f"split_script_{mode}"]]) for mode in MODES]
    assert found == [{"LATIN"}, {"GREEK", "HEBREW"}, {"CYRILLIC"}]


def test_attribution_names_every_family_with_package_and_licence() -> None:
    text = PATH.with_name("GLYPHS_ATTRIBUTION.md").read_text(encoding="utf-8")
    columns = (ARRAYS["face_families"], ARRAYS["face_packages"], ARRAYS["face_licences"])
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    for family, package, licence in zip(*columns, strict=True):
        assert f"| {package} | {licence} | " in rows[f"| {family}"]


def test_a_missing_or_damaged_file_says_to_reinstall(tmp_path: Path) -> None:
    file, content = tmp_path / "glyphs.npz", PATH.read_bytes()
    with pytest.raises(FileNotFoundError, match="found no file: reinstall the package"):
        glyph_arrays(file)
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    for damaged in (b"", content[:-4000], changed):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"got \d+ bytes that do not unpack .*reinstall"):
            glyph_arrays(file)


@pytest.mark.parametrize(("level", "expected"), list(zip(LEVELS, PIXELS, strict=True)))
def test_pixels_are_the_same_on_every_machine(level: str, expected: str) -> None:
    images = Glyphs("test", level=level).images.numpy()
    assert hashlib.sha256(images).hexdigest()[:16] == expected


def test_labels_indices_and_characters_agree() -> None:
    glyphs = Glyphs("test", split="script", level="clean")
    assert sorted(glyphs.labels_to_indices) == list(range(105)) == list(range(len(glyphs.classes)))
    for label, indices in glyphs.labels_to_indices.items():
        assert glyphs.labels[indices].eq(label).all()
        own = np.flatnonzero(ARRAYS["codepoints"] == ord(glyphs.classes[label])).item()
        row = np.flatnonzero(ARRAYS["labels"] == own)[0]
        assert np.array_equal(glyphs.images[indices[0], 0], ARRAYS["images"][row])
        assert glyphs.face_families[indices[0]] == ARRAYS["face_families"][ARRAYS["faces"][row]]
    assert sum(map(len, glyphs.labels_to_indices.values())) == len(glyphs) == len(glyphs.labels)
    image, label = glyphs[5]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32 and isinstance(label, int)
    assert torch.equal(image, glyphs.images[5].float() / 255)
    assert torch.equal(image, Glyphs("test", split="script", level="clean", device="cpu")[5][0])


def test_seed_decides_the_distortion_and_leaves_global_generators_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    same, again, other = (Glyphs("validation", seed=seed).images for seed in (3, 3, 4))
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(("options", "message"), [
    ({"mode": "valid"}, "got 'valid'; did you mean 'validation'?"), ({"seed": -1}, "got -1"),
    ({"split": "scripts"}, "did you mean 'script'?"), ({"level": "med"}, "did you mean 'medium'?"),
])  # fmt: skip
def test_wrong_options_name_the_right_ones(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        Glyphs(**options)
    assert message in str(raised.value)


def test_warp_agrees_with_bilinear_interpolation_in_floating_point() -> None:
    drawings = ARRAYS["images"][::100]
    warp = Warp(rotation=18, scale=(0.7, 1.1), shear=0.2, shift=2.5, elastic=0)
    warped = warp(drawings, np.random.RandomState(0))
    matrices, offsets = warp._affine(len(drawings), np.random.RandomState(0))
    for image, result, matrix, offset in zip(drawings, warped, matrices, offsets, strict=True):
        expected = _bilinear(image.astype(float), matrix / 1024, offset / 2048)
        # Positions are rounded to 1/256 pixel: at most 2 of 255 grey values along the two axes.
        assert np.abs(result - expected).max() <= 2.5


def _bilinear(image: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Hat functions around each source position, summed over all pixels; black beyond."""
    column_and_row = np.indices((28, 28))[::-1].reshape(2, -1) - 13.5
    x, y = matrix @ column_and_row + offset[:, None]
    across, down = (np.maximum(0, 1 - np.abs(p[:, None] - np.arange(28))) for p in (x, y))
    return np.einsum("pj,pi,ji->p", down, across, image, optimize=True).reshape(28, 28)
