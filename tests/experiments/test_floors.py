"""The folders of experiments/ stand on floors, and imports go down."""

from pathlib import Path

import pytest
from without_extras import names_of

HOUSE = Path(__file__).parents[2] / "experiments"
FLOORS = [{"extra", "statistics"}, {"tracking"}, {"training", "sweeps"}, {"ingredients", "report"},
          {"papers", "benchmark", "build_glyphs", "train", "sweep", "doctor"}]  # fmt: skip


def imported(path: Path) -> set[str]:
    """The folders, or modules at the top, of experiments/ that a file imports."""
    return {name.split(".")[1] for name in names_of(path) if name.startswith("experiments.")}


def files(name: str) -> list[Path]:
    folder = HOUSE / name
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def test_everything_has_its_floor() -> None:
    there = {p.stem for p in HOUSE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert there - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_go_down(floor: int) -> None:
    """Those of the lowest, which all may need, to nothing."""
    below = set().union(*FLOORS[:floor])
    for name in FLOORS[floor]:
        for path in files(name):
            assert imported(path) <= below | {name}, path


def test_what_needs_learn2learn_imports_the_library_first() -> None:
    """Which repairs it, and torchvision beside a CPU-only torch: each module imports alone."""
    needy = [path for path in sorted(HOUSE.rglob("*.py"))
             if {"learn2learn", "torchvision"} & {name.split(".")[0] for name in names_of(path)}]
    assert needy
    for path in needy:
        assert "l2l_implicit" in names_of(path.parent / "__init__.py"), path
