"""A training that takes a second, for the tests of sweeps: it records what a real one does."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from experiments.tracking import TrackedExperiment, UserError, record
from experiments.tracking.config import RunSettings


class Cell(RunSettings):
    cell: str | None = None
    lr: float = 0.1
    pause: float = 0.0
    hold: bool = False
    fault: str = ""
    folder: str = ""
    output: str = ""
    seed: int = 0


ex = TrackedExperiment("toy_cell", settings=Cell)


@ex.named_config
def toy() -> None:
    """Nothing else."""


def wait_for_leave(folder: Path) -> None:
    """Until a test lets as many trainings end as have started; in vain not for ever."""
    number = len((folder / "started").read_text().splitlines())
    deadline = time.monotonic() + 300.0
    while time.monotonic() < deadline:
        if (leave := folder / "leave").exists() and int(leave.read_text()) >= number:
            break
        time.sleep(0.02)


@ex.automain
def main(
    _run: Any, cell: str, lr: float, pause: float, hold: bool, fault: str, folder: str
) -> Any:
    with open(Path(folder) / "started", "a") as file:
        file.write(f"{cell} {os.getpid()} {os.getppid()}\n")
    first = not (Path(folder) / f"{cell}-tried").exists()
    (Path(folder) / f"{cell}-tried").touch()
    if fault == "once" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "always":
        raise UserError("the toy was told to fail")
    if hold:
        wait_for_leave(Path(folder))
    time.sleep(pause)
    record(_run, {"validation/accuracy": 0.5}, 1)
    record(_run, {"validation/accuracy": 1 - abs(lr - 0.2)}, 2)
    return {"test_accuracy": 0.6, "test_half_width": 0.01}
