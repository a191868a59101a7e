"""The configured tasks of a small data set, and a machine without a network."""

import socket
from pathlib import Path
from typing import Any

import pytest

from experiments.ingredients.tasks import make_tasks, tasks
from experiments.training.episodes import Tasks

SMALL = {"ways": 3, "shots": 1, "queries": 2}


def made(name: str, root: Path, **changes: Any) -> Tasks:
    """The task sets as an experiment makes them, 3-way 1-shot with 2 queries if not changed."""
    asked = {**SMALL, "name": name, "root": str(root), **changes}
    return make_tasks(**{**tasks.configurations[0](), **asked})


def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every connection is refused; returns the list of what will be tried."""
    tried: list[Any] = []

    def refuse(*address: Any, **options: Any) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried
