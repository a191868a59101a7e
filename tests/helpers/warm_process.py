"""Processes of their own in which the slow imports of others are made: they are forked from one
that has imported torch and the like, and nothing of ours or of what needs ours before it.

Each is what `python WORDS` is: ["-m", MODULE, ...], ["-c", CODE, ...] or [FILE, ...].
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

DEADLINE = 500.0  # seconds
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "scipy.signal", "matplotlib.pyplot", "pandas"])


def become(
    words: Sequence[str], folder: str, environment: Mapping[str, str], outputs: tuple[str, str]
) -> None:
    """What `python WORDS` is there, in this process; what it prints is added to two files."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for stream, path in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream.fileno())
        stream.reconfigure(write_through=True)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv[:] = words[words[0] in ("-m", "-c") :]
    sys.path.insert(0, folder)
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


class Warm(CONTEXT.Process):  # type: ignore[name-defined, misc]
    """One that has begun, with what a `subprocess.Popen` has."""

    def __init__(self, words: Sequence[object], folder: Path, environment: Mapping[str, str],
                 out: Path, err: Path | None = None) -> None:  # fmt: skip
        outputs = str(out), str(err or out)
        there = [str(word) for word in words], str(folder), dict(environment), outputs
        super().__init__(target=become, args=there)
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout or 0.0)
        return self.exitcode


def run(
    words: Sequence[object], folder: Path, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """One to its end; killed with an error if that takes longer than `DEADLINE`."""
    with tempfile.TemporaryDirectory() as place:
        files = Path(place) / "out", Path(place) / "err"
        process = Warm(words, folder, environment, *files)
        try:
            status = process.wait(DEADLINE)
        finally:
            process.kill()
        printed = (file.read_text("utf-8", "replace") for file in files)
        return subprocess.CompletedProcess(words, status, *printed)
