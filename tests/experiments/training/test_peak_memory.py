"""Live tensor bytes against allocations of known size; freed memory against page faults."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.training.peak_memory import peak_memory, process_peak

ROOT = Path(__file__).parents[3]


def allocate() -> None:
    first = torch.empty(1 << 20, dtype=torch.uint8)
    second = torch.empty(1 << 21, dtype=torch.uint8)
    del first
    third = torch.empty(1 << 19, dtype=torch.uint8)
    del second, third


def test_a_known_allocation_counts_and_what_was_there_does_not() -> None:
    before = torch.zeros(1 << 20)
    assert peak_memory(allocate) == (1 << 20) + (1 << 21)
    assert peak_memory(lambda: before.view(2, -1)[0].mul_(2)) == 0
    assert process_peak() > 50 * 2**20


def test_what_autograd_saves_counts_until_it_is_freed() -> None:
    x = torch.ones(1000, requires_grad=True)

    def thrice() -> None:
        for _ in range(3):
            x.exp().exp().sum().backward()

    once = peak_memory(lambda: x.exp().exp().sum().backward())
    assert once >= 3 * 4000
    assert peak_memory(thrice) <= once + 4000 + 16


# 20 times 64 MiB, written to and freed: 16,384 pages of 4 KiB each, if the system maps them anew.
# The module alone: its package imports learn2learn, which has nothing to do with it.
FAULTS = f"""
import resource, runpy, sys, torch
module = runpy.run_path({sys.modules[peak_memory.__module__].__file__!r})
kept = "keep" in sys.argv and module["keep_freed_memory"]()
for _ in range(20):
    torch.ones(2**24)  # the heap grows at first
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(word: str, **environment: str) -> tuple[int, int]:
    command = [sys.executable, "-c", FAULTS, word]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    kept, number = ran.stdout.split()
    return int(kept), int(number)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's mallopt")
def test_freed_memory_is_used_again_unless_the_user_has_set_it() -> None:
    kept, number = faults("keep")
    assert kept == 1
    assert number < 1_000 < 10_000 < faults("default")[1]
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == 0
