"""Do what a tutorial says, where one is: `python tests/helpers/docs_tutorial.py PAGE.md`.

Blocks run in the order of the page. Python blocks share one namespace, in this process; a block
with a title is written to a file of that name; bash runs the shell blocks and stops at an error.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from docs_blocks import Block, blocks


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
