"""The fenced blocks of a Markdown page, with what its comments say of them. No torch here.

As a program it does what a tutorial says, where one is: `docs_blocks.py PAGE.md`. Blocks run in the
order of the page. Python blocks share one namespace, in this process; a block with a title is
written to a file of that name; bash runs the shell blocks and stops at an error.

    <!-- not run in tests: REASON -->   the commands that follow, or the block, are not run
    <!-- in tests: CODE -->             a line of Python that only the tests run, at this place
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*) ?(.*)$")
NOT_RUN = re.compile(r"^<!-- not run in tests: (.+) -->$")
IN_TESTS = re.compile(r"^<!-- in tests: (.+) -->$")


class Block(NamedTuple):
    """A fenced block, or a comment's line of Python."""

    language: str  # what stands behind the fence; "in tests" for a comment
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
            yield Block("in tests", "", f"{code[1]}\n", number, "")
        elif line.strip():
            reason = ""  # the comment stands directly above its block


def commands(text: str) -> list[str]:
    """The command lines of a shell block: comments dropped, continued lines joined."""
    joined = text.replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*$", "", line).strip() for line in joined.splitlines()]
    return [line for line in lines if line]


def follow(page: Path) -> None:
    """Run the page; the first error ends it, with the line of the page in its traceback."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if not block.reason:
            _run(block, page, namespace)


def _run(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")
    elif block.language in ("python", "in tests"):
        lines = "\n" * (block.line - 1)  # so that a traceback names the page's own lines
        exec(compile(lines + block.text, str(page), "exec"), namespace)
    elif block.language == "sh":
        print(f"$ {block.text}", end="", flush=True)
        subprocess.run(["bash", "-e", "-o", "pipefail", "-c", block.text], check=True)


if __name__ == "__main__":
    follow(Path(sys.argv[1]).absolute())
