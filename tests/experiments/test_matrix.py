"""Every algorithm on every benchmark: a few outer iterations of the real command, on small data
sets in the formats that the real ones have on disk.

Without ``-m slow`` every algorithm on glyphs and sine, and each benchmark with a head, a whole
network, and a method that adapts nothing.
"""

import math
from pathlib import Path
from typing import Any

import pytest
from disk_formats import WRITERS
from small_benchmarks import no_network

from experiments.ingredients.algorithm_table import ALGORITHMS, OF_CLASSES, VARIANTS
from experiments.ingredients.named_configs import BENCHMARKS
from experiments.train import ex

SMALL: dict[str, Any] = {"iterations": 2, "meta_batch": 1, "validate_every": 2,
                         "validation_tasks": 2, "test_tasks": 2}  # fmt: skip
IMAGES = {"tasks.ways": 3, "tasks.shots": 1, "tasks.queries": 2, "model.hidden": 4}
METHODS, OF_A_KIND = [*ALGORITHMS, *VARIANTS], ("ImplicitCGHead", "maml", "protonet")
CELLS = [
    pytest.param(benchmark, method, marks=() if quick else pytest.mark.slow)
    for method in METHODS for benchmark in BENCHMARKS
    if benchmark != "sine" or method not in OF_CLASSES
    for quick in [benchmark in ("glyphs", "sine") or method in OF_A_KIND]
]  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*results do not compare:UserWarning"),
    pytest.mark.filterwarnings("ignore::l2l_implicit.UnsolvedWarning"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All data sets, each in its own format."""
    path = tmp_path_factory.mktemp("data")
    for name, write in WRITERS.items():
        write(path / name, 4, 4)
    return path


@pytest.mark.parametrize(("benchmark", "method"), CELLS)
def test_cell(benchmark: str, method: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = no_network(monkeypatch)
    settings = {**SMALL, "output": str(root / "runs")}
    # A fixed inner step of 0.1 diverges on a squared error of amplitudes up to 5.
    settings |= IMAGES if benchmark != "sine" else {"algorithm.lr": 0.001}
    if benchmark in WRITERS:
        settings["tasks.root"] = str(root / benchmark)
    if benchmark in ("mini_imagenet", "tiered_imagenet", "omniglot"):
        settings["model.name"] = "cnn4"
    options = {"--unobserved": True, "--loglevel": "ERROR"}
    result = ex.run(None, settings, [benchmark, method], options=options).result
    assert not tried
    assert result["iterations"] == 2 and result["diverged"] is None
    if benchmark == "sine":
        assert math.isfinite(result["test_mse"]) and "centroid_accuracy" not in result
    else:
        assert 0.0 <= result["test_accuracy"] <= 1.0
        assert 0.0 <= result["centroid_accuracy"] <= 1.0
    assert result["step_peak_bytes"] > 0
