"""The papers' figures, drawn again: each experiment is `python -m experiments.papers.NAME`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def keep_picture(run: Any, output: str, name: str, draw: Callable[[Path], None]) -> None:
    """Draw into a folder of the run's own, keep the picture with the run, and say where it is."""
    own = str(run._id) if run._id is not None else time.strftime("unobserved-%Y%m%d-%H%M%S")
    path = Path(output) / own / name
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path)
    run.add_artifact(path)
    print(f"\npicture: {path}")
