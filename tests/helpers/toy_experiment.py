"""A tiny experiment that the tests of the tracking run as a real process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.tracking import (  # noqa: E402
    TrackedExperiment,
    TrackedIngredient,
    UserError,
    record,
)

data = TrackedIngredient("data")


@data.config
def data_config() -> None:
    ways = 5  # noqa: F841
    augment = {"flip": True, "noise": {"scale": 0.1}}  # noqa: F841


@data.named_config
def few() -> None:
    """Two ways."""
    ways = 2  # noqa: F841


ex = TrackedExperiment("toy", ingredients=[data], types={"limit": int | None})


@ex.config
def config() -> None:
    steps = 3  # noqa: F841
    lr = 0.1  # noqa: F841
    flag = True  # noqa: F841
    pause = 0.0  # noqa: F841
    limit = None  # noqa: F841
    anything = None  # noqa: F841
    widths = [32, 64]  # noqa: F841
    fault = ""  # noqa: F841
    say = ""  # noqa: F841
    hold = ""  # noqa: F841


@ex.named_config
def quick() -> None:
    """One step."""
    steps = 1  # noqa: F841


@ex.named_config
def misspelt() -> None:
    """Sets an entry that does not exist."""
    stepz = 1  # noqa: F841


def wait_for_file(path: str) -> None:
    """Until a test has made it; in vain not for ever, since a failed test leaves the process."""
    deadline = time.monotonic() + 300.0
    while path and not Path(path).exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def fail(run: Any, fault: str) -> None:
    """The mistakes a main function can make."""
    if fault == "user":
        raise UserError("the toy was told to fail")
    if fault == "bug":
        raise RuntimeError("a bug of the toy")
    if fault == "artifact":
        run.add_artifact("no/such/file.txt")
    if fault == "leak":
        raise RuntimeError("cannot read " + os.environ["L2L_IMPLICIT_MONGO_URL"])
    if fault == "value":
        run.log_scalar("loss", np.zeros(3))
    if fault == "name":
        run.log_scalar("train.loss", 1.0)
    if fault == "info":
        run.info.update(huge=2**80, scalar=np.float64(0.5), array=np.arange(3))
    if fault == "long":
        print("x" * 99 + "\n", end="", flush=True)
        for _ in range(20):
            print(("y" * 99 + "\n") * 1000, end="")


@ex.automain
def main(_run: Any, steps: int, pause: float, fault: str, say: str, hold: str) -> Any:
    print("begin", say, flush=True)
    fail(_run, fault)
    for step in range(steps):
        record(_run, {"train/loss": np.float64(1 / (1 + step)), "train/nan": float("nan")}, step)
        print(f"\rstep {step}", end="", flush=True)
        if step == steps // 2:
            wait_for_file(hold)
        time.sleep(pause)
    print("\nend")
    note = Path(__file__)
    _run.add_artifact(str(note), name="note.py")
    return np.float32(0.5)
