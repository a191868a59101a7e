"""Check a plan's settings against the experiment's configuration without running anything."""

from __future__ import annotations

import shlex
import subprocess
import sys

from experiments.sweeps.cells import Cell
from experiments.sweeps.plan import Plan
from experiments.sweeps.training import environment


def check_settings(plan: Plan) -> int:
    """Have one cell of every method and stage print its configuration; 1 if one is refused."""
    refused = 0
    for name, cell in _samples(plan).items():
        command = [sys.executable, "-m", cell.module, "print_config", "with", *cell.arguments()]
        answer = subprocess.run(command, env=environment(), capture_output=True, text=True)
        refused += answer.returncode != 0
        wrong = f"{_reason(answer.stdout + answer.stderr)}: {shlex.join(command)}"
        print(f"{name}: {'fine' if answer.returncode == 0 else wrong}", flush=True)
    return 1 if refused else 0


def _samples(plan: Plan) -> dict[str, Cell]:
    found: dict[str, Cell] = {}
    for group in plan.groups:
        for cells in (group.grid, group.finals[0]):
            found.update(list(cells.items())[:1])
    return found


def _reason(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()] or ["it printed nothing"]
    return next((line for line in lines if line.startswith("error: ")), lines[-1])
