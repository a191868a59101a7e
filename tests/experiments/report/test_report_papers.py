"""The papers' figures that one run holds: what is drawn, what is missing; nothing is averaged."""

from collections.abc import Mapping
from typing import Any

from report_runs import Recorder, Report, markdown, rows

pytest_plugins = ("report_fixtures",)

MIB = 2.0**20
MEMORY = {"inner_steps": [1, 5, 20], "ways": 5, "shots": 5, "queries": 5, "pixels": 32,
          "hidden": 64, "limit_gib": 4.0, "device": "cpu", "seed": 0}  # fmt: skip
PEAKS = {
    "maml/as_published": {1: 100.0, 5: 250.0},
    "rm_metal/cached": {1: 50.0, 5: 50.0, 20: 50.0},
    "anil/cached": {1: 50.0, 5: 40.0, 20: 45.0},
    "supervised": {0: 49.0},
}


def memory(recorder: Recorder, scale: float = 1, updates: Mapping[str, Any] | None = None,
           **options: Any) -> None:  # fmt: skip
    metrics = {f"seconds/{name}": dict.fromkeys(by, 0.125) for name, by in PEAKS.items()}
    for name, by in PEAKS.items():
        metrics[f"memory/{name}"] = {k: v * scale * MIB for k, v in by.items()}
    recorder.run({**MEMORY, **(updates or {})}, metrics, experiment="memory",
                 meta={"config_updates": updates}, **options)  # fmt: skip


def test_runs_are_never_averaged_and_gaps_are_named(recorder: Recorder, report: Report) -> None:
    """The newest of equal settings counts; of other settings each is drawn by itself."""
    memory(recorder, 0.5, sources={"a.py": "1"})
    memory(recorder, sources={"a.py": "2"})
    memory(recorder, 0.5, {"hidden": 16})
    memory(recorder, updates={"seed": 1}, status="FAILED")
    folder = report("smoke")
    for end, mib, runs in (("", 50, "2"), ("_1", 25, "3")):
        table = rows(folder, f"memory_yang_peak{end}")
        (found,) = [r for r in table if r["method"] == "ImplicitCGHead"]
        assert (float(found["K_5"]), found["source_runs"]) == (mib * MIB, runs)
    text = markdown(folder, "memory_yang_peak")
    assert "| maml | as published | 100.0 | 250.0 | – | 80 |" in text
    assert "Missing: maml/as_published at K = 20" in text and "limit_gib=4.0" in text
    assert "Run 2 is the newest of 2 runs of equal settings" in text and "code differs" in text
    assert "in a.py" in text
    other = markdown(folder, "memory_yang_peak_1")
    assert "Other settings than above: python -m experiments.papers.memory with hidden=16" in other
    for number in range(4):
        memory(recorder, updates={"hidden": 32 + number})
    page = (report("smoke") / "index.html").read_text()
    assert "Not drawn: runs 3, 5, of still other settings." in page


def test_a_table_has_a_hundred_steps_and_says_so(recorder: Recorder, report: Report) -> None:
    """The figure's numbers are whole."""
    curve = dict.fromkeys(range(1, 301), MIB)
    recorder.run(MEMORY, {"memory/a/b": curve}, experiment="memory")
    folder = report("smoke")
    text = markdown(folder, "memory_yang_peak")
    assert "The first 100 of 300 are shown." in text
    assert "| K = 100 |" in text and "| K = 101 |" not in text
    assert len(rows(folder, "memory_yang")) == 300
