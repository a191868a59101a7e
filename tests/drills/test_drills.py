"""The drills that anyone can run, and that they can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.drills import kill_and_resume, long_run, mixed_precision
from experiments.drills.runs import report


@pytest.fixture(autouse=True)
def own_database(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A drill sets these for its process; here they are put back."""
    monkeypatch.setenv("L2L_IMPLICIT_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("L2L_IMPLICIT_MONGO_URL", "")


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path: Path) -> None:
    """In a step, a checkpoint, a validation, a database write, a start: wherever it falls."""
    assert kill_and_resume.drill(tmp_path, kills=20, seed=0)


@pytest.mark.slow
def test_five_thousand_iterations_do_not_grow(tmp_path: Path) -> None:
    assert long_run.drill(tmp_path, iterations=5000)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_learns_what_float32_learns(dtype: torch.dtype) -> None:
    half, single = (mixed_precision.drill(kind, 150, 0) for kind in (dtype, torch.float32))
    assert half.accuracy > single.accuracy - single.half_width - half.half_width
    assert half.unsolved == 0


def test_a_drill_that_finds_something_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [["run", "exit"], ["1", "0"]]
    assert report("title", rows, {"one": True})
    assert not report("title", rows, {"one": True, "two": False})
    assert "NO   two" in capsys.readouterr().out


def test_the_slope_is_that_of_the_line() -> None:
    assert long_run.slope([(i, 100 + 3 * i) for i in range(0, 50, 7)]) == pytest.approx(3000.0)
