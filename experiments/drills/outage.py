"""Take the database away in mid-run, for a while and for good, and see what is lost: nothing.

    python -m experiments.drills.outage
    python -m experiments.drills.outage --seconds 5 --folder DRILL

Exit status 0 if training went on meanwhile and every record is as without the outage; 1 if not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pymongo
from tqdm import tqdm
from train_process import Bench, same_parameters, same_record  # in tests/helpers

from experiments.drills.server import Server
from experiments.tracking.supervisor import free_port

SETTINGS = ("-b", "0.5", "with", "smoke", "anil", "validate_every=20")
NAME = "l2l_implicit"
UPLOAD = "experiments.tracking.upload"


def report(title: str, rows: Sequence[Sequence[str]], checks: Mapping[str, bool]) -> bool:
    """Print a table and what was checked; whether all of it holds."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}\n")
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print()
    for text, holds in checks.items():
        print(f"{'yes' if holds else 'NO '}  {text}")
    return all(checks.values())


class Drill:
    """Three runs on one server: undisturbed, with an outage, and with a server that never returns.

    Args:
        folder: of everything.
        seconds: the outage's length.
        iterations: of each run.
    """

    def __init__(self, folder: Path, seconds: float, iterations: int) -> None:
        self.seconds, self.rows = seconds, [["run", "outage", "iterations meanwhile", "exit"]]
        self._server = Server(folder / "server", free_port(None))
        self._bench = Bench(folder, f"mongodb://{self._server.address}/{NAME}")
        self._settings = (*SETTINGS, f"iterations={iterations}")

    def run(self) -> dict[str, bool]:
        """What was checked, and whether it holds."""
        self._server.start()
        try:
            with tqdm(total=3, desc="runs", unit="run") as bar:
                self._bench.finish(*self._settings)
                self.rows.append(["1", "none", "", "0"])
                bar.update()
                checks = self._for_a_while()
                bar.update()
                checks |= self._for_good()
                bar.update()
            return checks
        finally:
            self._server.kill()

    def _for_a_while(self) -> dict[str, bool]:
        patience = str(self.seconds + 60)
        process = self._bench.start(*self._settings, L2L_IMPLICIT_MONGO_PATIENCE=patience)
        self._wait_until_half(2)
        self._server.kill()
        before = self._iterations()
        time.sleep(self.seconds)
        meanwhile = self._iterations() - before
        self._server.start()
        status = process.wait()
        self.rows.append(["2", f"{self.seconds:g} s", str(meanwhile), str(status)])
        said = "The database is back" in self._bench.text()
        return {
            "training went on without the database": meanwhile > 0,
            "run 2 said that it was away, and back; exit status 0": said and status == 0,
            **self._same(2),
        }

    def _for_good(self) -> dict[str, bool]:
        process = self._bench.start(*self._settings, L2L_IMPLICIT_MONGO_PATIENCE="1")
        self._wait_until_half(3)
        self._server.kill()
        before = self._iterations()
        status = process.wait()
        (kept,) = self._journals()
        meanwhile = self._iterations() - before
        self.rows.append(["3", "for good", str(meanwhile), str(status)])
        self._server.start()
        said = f"python -m {UPLOAD} {kept}" in self._bench.text()
        self._bench.finish(str(kept), module=UPLOAD)
        return {
            "run 3 said where its record is, and ended with exit status 1": said and status == 1,
            **self._same(3),
            "no journal is left": not self._journals(),
        }

    def _same(self, run: int) -> dict[str, bool]:
        with self._client() as client:
            found = same_record(client[NAME], 1, run) | same_parameters(self._bench, 1, run)
        return {f"run {run}: {text}": holds for text, holds in found.items()}

    def _wait_until_half(self, run: int) -> None:
        """Until the database has a fifth of the run's points."""
        limit = time.monotonic() + 600
        with self._client() as client:
            whole = client[NAME]["metrics"].find_one({"run_id": 1, "name": "train/query_loss"})
            while time.monotonic() < limit:
                key = {"run_id": run, "name": "train/query_loss"}
                found = client[NAME]["metrics"].find_one(key)
                if found and len(found["steps"]) > len(whole["steps"]) // 5:
                    return
                time.sleep(0.1)
        raise RuntimeError(f"run {run} does not come to record; see {self._bench.log}")

    def _client(self) -> Any:
        return pymongo.MongoClient(self._server.address, serverSelectionTimeoutMS=20_000)

    def _journals(self) -> list[Path]:
        folder = Path(self._bench.environment["L2L_IMPLICIT_DATA"]) / "journals"
        return sorted(folder.glob("*.jsonl"))

    def _iterations(self) -> int:
        """Outer iterations in the journals, those of the run that goes on."""
        return sum(path.read_text().count('"train/query_loss"') for path in self._journals())


def drill(folder: Path, seconds: float, iterations: int = 300) -> bool:
    """Whether nothing was lost."""
    work = Drill(folder, seconds, iterations)
    checks = work.run()
    return report(f"The database away for {seconds:g} s, and for good; {folder}", work.rows, checks)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.drills.outage",
        description="Take the database away in mid-run, for a while and for good.",
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of the outage")
    parser.add_argument("--iterations", type=int, default=300, help="of each run")
    parser.add_argument("--folder", type=Path, help="of runs and server; else a temporary one")
    given = parser.parse_args(argv)
    os.umask(0o077)
    if given.folder is not None:
        given.folder.mkdir(parents=True)
        sys.exit(not drill(given.folder.absolute(), given.seconds, given.iterations))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        sys.exit(not drill(Path(folder), given.seconds, given.iterations))


if __name__ == "__main__":
    main()
