"""The journal, its upload, and what may be recorded."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bson import ObjectId
from sacred.observers import RunObserver
from toy_process import environment, points, run, write_journal

from experiments.tracking import TrackedExperiment, TrackingError, open_database, uploader
from experiments.tracking.journal import Journal, JournalReader
from experiments.tracking.output import CUT, HEAD, TAIL, Tape, keep_output
from experiments.tracking.uploader import Uploader, upload_journal
from experiments.tracking.values import as_number, as_step, storable


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder, also this process's own."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("L2L_IMPLICIT_DATA", str(folder))
        patch.setenv("HOME", str(folder))
        patch.delenv("L2L_IMPLICIT_MONGO_URL", raising=False)
        yield folder


@pytest.fixture(scope="module")
def database(data: Path) -> Iterator[Any]:
    """The embedded server's database."""
    with open_database() as documents:
        yield documents


def test_an_upload_may_be_repeated(tmp_path: Path, database: Any) -> None:
    path, losses = write_journal(tmp_path / "r", 1000, [1.0, math.inf, 0.5]), [1.0, math.inf, 0.5]
    for _ in range(2):
        again = Uploader(JournalReader(path), database)
        again.upload()
        again.upload()
    stored = database["runs"].find_one({"_id": 1000})
    assert (stored["status"], stored["captured_out"]) == ("COMPLETED", "abd")
    assert [item["name"] for item in stored["artifacts"]] == ["a.bin"]
    assert points(database, 1000) == {"loss": losses}
    assert database["fs.files"].count_documents({"filename": "artifact://runs/1000/a.bin"}) == 1
    (metric,) = stored["info"]["metrics"]
    assert database["metrics"].find_one({"_id": ObjectId(metric["id"])})["name"] == "loss"


@pytest.mark.parametrize("left", [0, 1, 2])
def test_points_the_database_has_lost_are_written_again(
    tmp_path: Path, database: Any, left: int
) -> None:
    number = 1100 + left
    path = write_journal(tmp_path / f"r{left}", number, [1.0, 2.0, 3.0])
    upload = Uploader(JournalReader(path), database)
    upload.upload()
    lost = {key: {"$each": [], "$slice": left} for key in ("steps", "values", "timestamps")}
    database["metrics"].update_one({"run_id": number}, {"$push": lost})
    database["runs"].delete_one({"_id": number})
    with open(path, "ab") as file:
        file.write(b'{"metric": "loss", "step": 3, "value": 4.0, "time": null}\n')
    with pytest.raises(TrackingError, match="lost points of 'loss'"):
        upload.upload()
    upload.upload()
    assert points(database, number) == {"loss": [1.0, 2.0, 3.0, 4.0]}
    assert database["runs"].find_one({"_id": number})["status"] == "COMPLETED"


def test_a_number_taken_by_another_run_is_replaced(tmp_path: Path, database: Any) -> None:
    first = write_journal(tmp_path / "one", 1200, [1.0])
    second = write_journal(tmp_path / "two", 1200, [2.0])
    uploads = [upload_journal(path, database) for path in (first, second)]
    assert [upload.run_id for upload in uploads if upload] == [1200, 1201]
    assert points(database, 1201) == {"loss": [2.0]}
    assert not first.exists() and not second.exists()


def test_a_long_series_goes_on_in_a_second_document(
    tmp_path: Path, database: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "POINTS_PER_DOCUMENT", 2)
    upload_journal(write_journal(tmp_path / "r", 1300, [1.0, 2.0, 3.0, 4.0, 5.0]), database)
    stored = {m["name"]: m["values"] for m in database["metrics"].find({"run_id": 1300})}
    assert stored == {"loss": [1.0, 2.0], "loss (2)": [3.0, 4.0], "loss (3)": [5.0]}


def test_a_journal_in_use_is_left_alone(tmp_path: Path, database: Any) -> None:
    journal = Journal(tmp_path / "r", {"token": "t"})
    assert upload_journal(journal.path, database) is None
    assert journal.path.stat().st_mode & 0o777 == 0o600
    journal.close()


def test_torn_lines_hide_no_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "r", {"token": "t"})
    reader = JournalReader(journal.path)
    journal.append({"set": {"a": 1}})
    with open(journal.path, "ab") as file:
        file.write(b'{"set": {"b"')
        file.flush()
        assert list(reader.entries()) == [{"set": {"a": 1}}] and not list(reader.entries())
        file.write(b"\n")
    journal.append({"set": {"c": math.nan}})
    assert math.isnan(next(reader.entries())["set"]["c"]) and reader.damaged == 1
    journal.close()
    reader.close()


def test_a_strange_file_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("{}\n")
    with pytest.raises(ValueError, match="not the journal of a run"):
        JournalReader(tmp_path / "r")


@pytest.mark.parametrize(
    "value",
    [2, 2.0, np.float32(2), np.int64(2), np.array([[2.0]]), torch.tensor(2.0),
     torch.ones(1, requires_grad=True) * 2],
)
def test_scalars_of_every_kind_are_numbers(value: Any) -> None:
    assert as_number("loss", value) == 2 and type(as_number("loss", value)) in (int, float)


@pytest.mark.parametrize("value", [None, "2", [2.0], np.zeros(2), torch.zeros(0), 1j])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="metric 'loss' must be a number"):
        as_number("loss", value)


def test_steps_are_whole_numbers() -> None:
    assert (as_step("loss", np.int32(3)), as_step("loss", None)) == (3, None)
    with pytest.raises(TypeError, match="step of metric 'loss' must be an int, got 0.5"):
        as_step("loss", 0.5)


def test_anything_becomes_plain_data() -> None:
    value = {1: np.float64(0.5), "big": 2**70, "a": np.arange(2), "t": (torch.ones(2), {3})}
    plain = {"1": 0.5, "big": str(2**70), "a": [0, 1], "t": [[1.0, 1.0], [3]]}
    assert storable(value) == plain and type(storable(value)["1"]) is float
    assert isinstance(storable(threading.Event()), (dict, str))


def test_output_is_drawn_and_cut() -> None:
    assert keep_output("a 1%\ra 2%\nb\n") == "a 2%\nb\n"
    assert keep_output("a 2%\r") == "a 2%\r"
    text = ""
    for chunk in range(30):
        text = keep_output(text + str(chunk % 10) * 100_000)
    assert len(text) == HEAD + len(CUT) + TAIL and text.count("output cut here") == 1
    assert text.startswith("0") and text.endswith("9" * 100_000)


def test_what_is_printed_is_read_once_and_not_kept() -> None:
    tape, read = Tape(), []
    writers = [threading.Thread(target=lambda: [tape.write("x") for _ in range(5000)])
               for _ in range(4)]  # fmt: skip
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        read.append(tape.read())
    read.append(tape.read())
    assert sum(map(len, read)) == 20_000 and tape.read() == ""


def test_a_run_with_awkward_information_completes(data: Path, database: Any) -> None:
    code, output = run(environment(data), "with", "quick", "fault=info")
    assert code == 0, output
    stored = database["runs"].find_one({}, sort=[("start_time", -1)])
    info = stored["info"]
    assert (info["huge"], info["scalar"], info["array"]) == (str(2**80), 0.5, [0, 1, 2])
    assert stored["result"] == 0.5


def test_a_long_output_is_cut_and_the_run_completes(data: Path, database: Any) -> None:
    assert run(environment(data), "with", "quick", "fault=long")[0] == 0
    kept = database["runs"].find_one({}, sort=[("start_time", -1)])["captured_out"]
    assert len(kept) == HEAD + len(CUT) + TAIL
    assert kept.startswith("begin") and kept.endswith("end\n")


def test_an_expected_error_is_recorded_as_failed(data: Path, database: Any) -> None:
    assert run(environment(data), "with", "fault=user")[0] == 1
    stored = database["runs"].find_one({}, sort=[("start_time", -1)])
    assert stored["status"] == "FAILED" and "told to fail" in "".join(stored["fail_trace"])


def test_hostport_option_reaches_the_embedded_server(data: Path, database: Any) -> None:
    host, port = next(iter(database.client.nodes))
    assert run(environment(data), "-m", f"{host}:{port}:other", "with", "quick")[0] == 0
    other = database.client["other"]
    assert other["runs"].distinct("status") == ["COMPLETED"]
    assert "run_id_1_name_1" in other["metrics"].index_information()
    names = {name for name, _ in other["runs"].find_one()["experiment"]["sources"]}
    assert {"tests/helpers/toy_experiment.py", "experiments/tracking/observer.py"} <= names


class Broken(RunObserver):
    """An observer of somebody else's that fails."""

    def heartbeat_event(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")


def test_a_failed_observer_of_others_is_an_error(data: Path, database: Any) -> None:
    experiment = TrackedExperiment("other")
    experiment.observers.append(Broken())
    experiment.main(lambda: None)
    with pytest.raises(TrackingError, match="Broken failed"):
        experiment.run()
    assert database["runs"].find_one({"experiment.name": "other"})["status"] == "COMPLETED"
