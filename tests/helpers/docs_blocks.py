"""The fenced blocks of a Markdown page, with what its comments say of them. No torch here.

As a program it does what a tutorial says, where one is: `docs_blocks.py [--full] PAGE.md`. Blocks
run in the order of the page. Python blocks share one namespace, in this process; a block with a
title is written to a file of that name; bash runs the shell blocks and stops at an error.

    <!-- not run in tests: REASON -->      the commands that follow, or the block, are not run
    <!-- in tests: CODE -->                a line of Python that only the tests run, at this place
    <!-- shortened in tests: CODE -->      the same, but not with --full

With --full an `output` block has to be what the block above it printed, see `difference`.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*) ?(.*)$")
NOT_RUN = re.compile(r"^<!-- not run in tests: (.+) -->$")
IN_TESTS = re.compile(r"^<!-- (in tests|shortened in tests): (.+) -->$")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]\d+)?(?![\w.]*\d)")
WITHIN = re.compile(r"\bwithin (\d+(?:\.\d+)?)\b")


class Block(NamedTuple):
    """A fenced block, or a comment's line of Python."""

    language: str  # what stands behind the fence; for a comment what it begins with
    title: str  # of ``title="..."`` behind it, or ""
    text: str
    line: int  # number of its first line in the page, from 1
    reason: str  # why the tests do not run it, or ""


def pages() -> list[Path]:
    """The README and every page below docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[Block]:
    """Every block of a page in its order."""
    reason, opening, body = "", None, list[str]()
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opening is not None:
            if line.startswith("```"):
                yield opening._replace(text="".join(f"{part}\n" for part in body))
                opening, body, reason = None, [], ""
            else:
                body.append(line)
        elif fence is not None:
            title = re.search(r'title="([^"]+)"', fence[2])
            opening = Block(fence[1], title[1] if title else "", "", number + 1, reason)
        elif (said := NOT_RUN.match(line)) is not None:
            reason = said[1]
        elif (code := IN_TESTS.match(line)) is not None:
            yield Block(code[1], "", f"{code[2]}\n", number, "")
        elif line.strip():
            reason = ""  # the comment stands directly above its block


def commands(text: str) -> list[str]:
    """The command lines of a shell block: comments dropped, continued lines joined."""
    joined = text.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def difference(block: Block, printed: str) -> str:
    """What ``printed`` has other than an output block, or "".

    ``...`` stands for anything, of any length. Whole numbers are equal, one with an exponent is
    within a factor of ten, and one with a point within what the block's title says ("within 0.05"),
    or else within one of its last digit.
    """
    pieces = re.split(rf"({NUMBER.pattern}|\.\.\.)", block.text.strip())
    parts = [re.escape(piece) for piece in pieces]
    parts[1::2] = [".*?" if p == "..." else f"({NUMBER.pattern})" for p in pieces[1::2]]
    found = re.fullmatch("".join(parts), printed.strip(), re.DOTALL)
    if found is None:
        return "another text"
    stated = [piece for piece in pieces[1::2] if piece != "..."]
    said = WITHIN.search(block.title)
    wrong = [
        f"{number} for {expected}"
        for expected, number in zip(stated, found.groups(), strict=True)
        if not _is_near(expected, number, float(said[1]) if said else None)
    ]
    return ", ".join(wrong)


def _is_near(expected: str, number: str, within: float | None) -> bool:
    a, b = float(expected), float(number)
    if "e" in expected or "e" in number:
        return a == b or (a != 0 and 0.1 <= b / a <= 10)
    if "." not in expected:
        return expected == number
    last_digit = 10.0 ** -len(expected.partition(".")[2])
    return abs(a - b) <= (last_digit if within is None else within) * (1 + 1e-9)


def follow(page: Path, *, full: bool = False) -> None:
    """Run the page; the first error ends it, with the line of the page in its traceback.

    ``full`` runs it as it is printed and compares what it prints. Then a page has to print.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, compared = "", 0
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.reason or (full and block.language == "shortened in tests"):
            continue
        if block.language != "output":
            printed = _run(block, page, namespace) or printed
        elif full:
            compared += 1
            wrong = difference(block, printed)
            assert not wrong, (
                f"{page.name}:{block.line}: expected the output as printed there, got {wrong}:\n"
                f"{printed}"
            )
    assert compared or not full, f"{page.name}: expected a block of output, got none"


def _run(block: Block, page: Path, namespace: dict[str, Any]) -> str:
    """Run a block and return what it printed."""
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")
    elif block.language in ("python", "in tests", "shortened in tests"):
        lines = "\n" * (block.line - 1)  # so that a traceback names the page's own lines
        code, printed = compile(lines + block.text, str(page), "exec"), io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, namespace)
        finally:
            print(printed.getvalue(), end="", flush=True)
        return printed.getvalue()
    elif block.language == "sh":
        print(f"$ {block.text}", end="", flush=True)
        command = ["bash", "-e", "-o", "pipefail", "-c", block.text]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        print(answer.stdout, end="", flush=True)
        answer.check_returncode()
        return answer.stdout
    return ""


if __name__ == "__main__":
    follow(Path(sys.argv[-1]).absolute(), full="--full" in sys.argv[1:-1])
