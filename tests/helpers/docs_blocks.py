"""The fenced blocks of a Markdown page, with what its comments say of them. No torch here.

    <!-- not run in tests: REASON -->   the commands that follow, or the block, are not run
    <!-- in tests: CODE -->             a line of Python that only the tests run, at this place
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*) ?(.*)$")
NOT_RUN = re.compile(r"^<!-- not run in tests: (.+) -->$")
IN_TESTS = re.compile(r"^<!-- in tests: (.+) -->$")


class Block(NamedTuple):
    """A fenced block, or a comment's line of Python.

    Attributes:
        language: what stands behind the fence; "in tests" for a comment.
        title: of ``title="..."`` behind it, or "".
        text: its lines.
        line: number of its first line in the page, from 1.
        reason: why the tests do not run it, or "".
    """

    language: str
    title: str
    text: str
    line: int
    reason: str


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
            yield Block("in tests", "", f"{code[1]}\n", number, "")
        elif line.strip():
            reason = ""  # the comment stands directly above its block


def commands(text: str) -> list[str]:
    """The command lines of a shell block: comments dropped, continued lines joined."""
    joined = text.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]
