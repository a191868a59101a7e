"""Which GPUs and which commit a run used, asked so that no strange answer stops the run.

Sacred calls nvidia-smi without a time limit, and dies of a repository without a commit or one
that git refuses to read.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from experiments.tracking.redact import Redactor

TIMEOUT = 5.0
GPU_QUERY = ["--query-gpu=driver_version,memory.total,name", "--format=csv,noheader,nounits"]


def gpu_info() -> dict[str, Any] | None:
    """{"driver_version": ..., "gpus": [{"model": ..., "total_memory": MiB}]}, None without any."""
    rows = [line.split(", ", 2) for line in (_ask("nvidia-smi", *GPU_QUERY) or "").splitlines()]
    gpus = [
        {"model": row[2], "total_memory": int(row[1])}
        for row in rows
        if len(row) == 3 and row[1].isdigit()
    ]
    return {"driver_version": rows[0][0], "gpus": gpus} if gpus else None


def repository_info(folder: Path | str) -> list[dict[str, Any]]:
    """[{"url", "commit", "dirty"}] of the repository around `folder`, [] without a commit.

    The URL carries no password or token; `dirty` counts changes of tracked files.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return []
    url = _git(folder, "remote", "get-url", "origin")
    url = url or _git(folder, "rev-parse", "--show-toplevel")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return [{"url": Redactor().text(url or ""), "commit": commit, "dirty": changes != ""}]


def _git(folder: Path | str, *arguments: str) -> str | None:
    return _ask("git", "-C", str(folder), *arguments)


def _ask(*command: str) -> str | None:
    """The command's output, None if there is no such command or it fails or hangs."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
