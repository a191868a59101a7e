"""A training that takes a second, for the tests of sweeps: it records what a real one does.

`SWEEP` is of it: a method with a grid, a plain one, one that dies, one that fails.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from experiments.sweeps.definition import Benchmark, Method, Sweep
from experiments.tracking import TrackedExperiment, UserError, record
from experiments.tracking.config import RunSettings

SWEEP = Sweep(
    methods={
        "tuned": Method(("toy",), grid=({"lr": 0.1}, {"lr": 0.2}, {"lr": 0.2001})),
        "plain": Method(("toy",), settings={"lr": 0.7}),
        "dying": Method(("toy",), settings={"fault": "once"}),
        "broken": Method(("toy",), settings={"fault": "always"}),
    },
    benchmarks={"toy": Benchmark()},
    seeds=2,
    module="toy_cell",
)


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
def main(_run: Any, cell: str, lr: float, pause: float, hold: bool, fault: str, folder: str) -> Any:
    with open(Path(folder) / "started", "a") as file:
        file.write(f"{cell} {os.getpid()} {os.getppid()}\n")
    tried = Path(folder) / f"{cell}-tried"
    if fault == "once" and not tried.exists():
        tried.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "always":
        raise UserError("the toy was told to fail")
    if hold:
        wait_for_leave(Path(folder))
    time.sleep(pause)
    record(_run, {"validation/accuracy": 0.5}, 1)
    record(_run, {"validation/accuracy": 1 - abs(lr - 0.2)}, 2)
    return {"test_accuracy": 0.6, "test_half_width": 0.01}
