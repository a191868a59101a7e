"""Page faults are what the system does for memory that a process maps anew."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

# 20 times 64 MiB, written to and freed: 16,384 pages of 4 KiB each.
FAULTS = """
import resource, sys, torch
from experiments.training.peak_memory import keep_freed_memory
kept = "keep" in sys.argv and keep_freed_memory()
for _ in range(20):
    torch.ones(2**24)  # the heap grows at first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(word: str, **environment: str) -> tuple[int, int]:
    command = [sys.executable, "-c", FAULTS, word]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kept, faults = ran.stdout.split()
    return int(kept), int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's mallopt")
def test_freed_memory_is_used_again() -> None:
    kept, faults = run("keep")
    assert kept == 1
    assert faults < 1_000 < 10_000 < run("default")[1]


def test_what_the_user_has_set_is_left_alone() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == 0
