"""The database taken away from a training, for a while and for good: nothing is lost."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from toy_process import Server, connected, finish, journals, read_until, run, start, wait_for
from train_process import RESULT, Bench, metrics, same_parameters

pytest_plugins = ("toy_process",)
SETTINGS = ("-b", "0.5", "with", "smoke", "anil", "validate_every=20", "iterations=300")
LOSS = "train/query_loss"
UPLOAD = "experiments.tracking.upload"


def training(folder: Path, server: Server, patience: str) -> subprocess.Popen[str]:
    own = {**server.url, "L2L_IMPLICIT_MONGO_PATIENCE": patience}
    return start(folder, *SETTINGS, module="experiments.train", folder=folder, **own)


def recorded(server: Server, number: int) -> int:
    """Outer iterations in the database."""
    with connected(server.address) as database:
        found = database["metrics"].find_one({"run_id": number, "name": LOSS})
    return len(found["steps"]) if found else 0


def iterations(folder: Path) -> int:
    """Those in the journal of the run that goes on."""
    return sum(path.read_text().count(f'"{LOSS}"') for path in journals(folder))


def record(server: Server, number: int) -> dict[str, Any]:
    """What two runs of the same settings have in common."""
    with connected(server.address) as database:
        run = database["runs"].find_one({"_id": number})
        result = {key: run["result"][key] for key in RESULT}
        return {"status": run["status"], "fields": sorted(run), "result": result,
                **metrics(database, number)}  # fmt: skip


@pytest.mark.slow
def test_the_database_is_away_for_a_while_and_for_good(tmp_path: Path, server: Server) -> None:
    code, output = finish(training(tmp_path, server, "30"))
    assert code == 0, output

    away = training(tmp_path, server, "300")
    wait_for(lambda: recorded(server, 2) > 20)
    server.kill()
    read_until(away, "The database is away")
    before = iterations(tmp_path)
    wait_for(lambda: iterations(tmp_path) > before + 50)  # training goes on meanwhile
    server.start()
    code, output = finish(away)
    assert code == 0 and "The database is back" in output, output

    lost = training(tmp_path, server, "1")
    wait_for(lambda: recorded(server, 3) > 20)
    server.kill()
    code, output = finish(lost)
    (kept,) = journals(tmp_path)
    assert code == 1 and f"python -m {UPLOAD} {kept}" in output, output
    server.start()
    code, output = run(tmp_path, str(kept), module=UPLOAD, **server.url)
    assert code == 0 and "run 3: COMPLETED" in output, output

    assert not journals(tmp_path)
    undisturbed = record(server, 1)
    assert undisturbed["status"] == "COMPLETED" and len(undisturbed) > 6
    for number in (2, 3):
        assert record(server, number) == undisturbed
        assert all(same_parameters(Bench(tmp_path), 1, number).values())
