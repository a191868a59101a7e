"""A tiny experiment that the tests of the tracking run as a real process."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments import tracking  # noqa: E402
from experiments.tracking import UserError, record  # noqa: E402
from experiments.tracking.config import Count, OfTuple, RunSettings, Settings  # noqa: E402


class Data(Settings):
    ways: int = 5  # classes a task
    flip: bool = True


data = tracking.TrackedIngredient("data", settings=Data)


@data.named_config
def few() -> None:
    """Two ways."""
    ways = 2  # noqa: F841


class Toy(RunSettings):
    steps: int = 3
    lr: float = 0.1
    flag: bool = True
    pause: float = 0.0
    limit: Count | None = None
    anything: Any = None
    widths: Annotated[list[int], OfTuple] = [32, 64]
    kind: Literal["slow", "fast"] = "slow"
    # a mistake of the main function;
    # empty: none
    fault: str = ""
    say: str = ""
    hold: str = ""


ex = tracking.TrackedExperiment("toy", ingredients=[data], settings=Toy)


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
    if fault == "artifact":
        run.add_artifact("no/such/file.txt")
    if fault == "leak":
        raise RuntimeError("cannot read " + os.environ["L2L_IMPLICIT_MONGO_URL"])
    if fault == "value":
        run.log_scalar("loss", np.zeros(3))
    if fault == "odd":
        run.info.update(huge=2**80, scalar=np.float64(0.5), array=np.arange(3))
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
    _run.add_artifact(__file__, name="note.py")
    return np.float32(0.5)
