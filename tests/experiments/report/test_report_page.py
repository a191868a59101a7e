"""What the report writes: a page of its own, LaTeX; databases that are empty, broken, large."""

import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pytest import CaptureFixture
from report_runs import WORDS, Recorder, Report, fill, rows

from experiments.report.__main__ import main
from experiments.report.summary import Archive, Request
from experiments.report.write import pictures
from experiments.sweeps.definitions import SWEEPS
from experiments.sweeps.plan import Plan, make_plan
from experiments.tracking.records import DatabaseRecords

pytest_plugins = ("report_runs",)

ROOT = Path(__file__).parents[3]


class Resources(HTMLParser):
    """What a page would fetch, and whether its tags are balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files_are_balanced_and_escaped(recorder: Recorder, plan: Plan, report: Report) -> None:
    """The page holds everything itself; tables as LaTeX."""
    fill(recorder, plan, random.Random(0), share=0.8)
    recorder.run({"tasks.name": "<b>&"}, result={"test_accuracy": 0.5}, info={"resumes": "<i>"})
    folder = report(*WORDS)
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Resources(text)
    assert not page.open and "<b>" not in text and "<i>" not in text
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert sum(address.startswith("data:image/svg+xml") for address in page.addresses) == 1
    assert "url(" not in text and "@import" not in text
    for name in re.findall(r"<code>(\w+\.(?:svg|png))</code>", text):
        assert (folder / name).read_bytes()[:5] in (b"\x89PNG\r", b"<?xml"), name
    files = sorted(folder.glob("*.tex"))
    assert len(files) >= 6
    for file in files:
        text = file.read_text(encoding="utf-8")
        body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        assert text.startswith("% command: python -m experiments.") and "\n% runs: " in text
        assert all(rf"\{rule}rule" in body for rule in ("top", "mid", "bottom"))
        assert body.count("{") == body.count("}") and body.isascii(), file.name
        assert not re.search(r"(?<!\\)[_%#]", body), file.name


@pytest.mark.parametrize("status", [None, "FAILED"])
def test_without_a_complete_run(status: str | None, recorder: Recorder, report: Report) -> None:
    """What is missing has its command, also for the papers' experiments."""
    papers = [f"experiments.papers.{name}" for name in ("memory", "hypergradient", "convergence")]
    for name in ["train", "memory", "hypergradient", "convergence"] if status else ():
        recorder.run({"tasks.name": "glyphs", "seed": 0}, experiment=name, status=status,
                     fail_trace=["Traceback", f"ValueError: {name} is broken"])  # fmt: skip
    folder = report()
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert ("4 runs: 4 FAILED" if status else "There are no runs yet.") in text
    assert ("ValueError: train is broken" in text) == bool(status)
    for module in papers:
        name = module.rpartition(".")[2]
        (row,) = rows(folder, f"missing_{name}")
        assert row["command"] == f"python -m {module}" and row["command"] in text
        assert row["state"] == ("failed" if status else "not run")
        assert (f"ValueError: {name} is broken" in row["why"]) == bool(status)
    assert not list(folder.glob("*.png"))
    assert {r["completed"] for r in rows(folder, "sweeps") if r["sweep"] == "accuracy"} == {
        f"0 of {len(make_plan(SWEEPS['accuracy'], {}).names())}"
    }


BAD = {
    "benchmark=glyphs": "KEY=VALUE needs one sweep that it was given to, got 0 names",
    "accuracy -m mongodb://a:b@c/d": "-m takes HOST:PORT:DB",
    "accuracy --output /dev/null/x": "Not a directory",
}


@pytest.mark.parametrize("words", list(BAD))
def test_bad_input_is_one_line(words: str, recorder: Recorder, capsys: CaptureFixture[str]) -> None:
    assert main(words.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and BAD[words] in error


def test_it_reads_only_and_needs_no_torch(recorder: Recorder, plan: Plan, tmp_path: Path) -> None:
    fill(recorder, plan, random.Random(0))

    def everything() -> dict[str, Any]:
        found = {name: recorder.documents[name]
                 for name in sorted(recorder.documents.list_collection_names())}  # fmt: skip
        return {name: (list(each.find()), each.index_information()) for name, each in found.items()}

    before = everything()
    program = (
        "import sys; from experiments.report.__main__ import main;"
        f" status = main(['accuracy', '--output', {str(tmp_path)!r}]);"
        " loaded = {'torch', 'l2l_implicit', 'learn2learn'} & set(sys.modules);"
        " sys.exit(f'loaded {loaded}' if loaded else status)"
    )
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert answer.returncode == 0, answer.stderr
    assert everything() == before


def test_the_documented_section_works(recorder: Recorder, documents: Any) -> None:
    """The example of docs/report.md, run as it stands."""
    text = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    example = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[-1]
    names: dict[str, Any] = {}
    exec(compile(example, "docs/report.md", "exec"), names)
    assert names["sections"](Request(Archive(DatabaseRecords(documents)))) == []
    recorder.run({"algorithm": "maml"}, {"mine/peak_bytes": {1: 1.0, 5: 2.0}}, experiment="mine")
    (section,) = names["sections"](Request(Archive(DatabaseRecords(documents))))
    (figure,) = section.items
    assert figure.records[1] == {"algorithm": "maml", "K": 5, "peak_bytes": 2.0}
    png, svg = pictures(figure)
    assert png.startswith(b"\x89PNG") and b"<svg" in svg
