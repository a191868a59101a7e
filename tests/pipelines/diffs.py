"""The diffs of docs/examples.md, and how to apply one."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "examples.md"
Hunk = tuple[str, str]  # the lines before, the lines after


def read_diffs() -> dict[str, list[Hunk]]:
    """The hunks for each script that the page names."""
    blocks = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return {_name(block): [_hunk(body) for body in _bodies(block)] for block in blocks}


def patched(text: str, hunks: list[Hunk]) -> str:
    """The text with each hunk applied, wherever its lines stand; they must stand there once."""
    for before, after in hunks:
        assert text.count(before) == 1, f"{text.count(before)} times:\n{before}"
        text = text.replace(before, after)
    return text


def added_lines(hunks: list[Hunk]) -> list[str]:
    """What a user types."""
    return [
        line
        for before, after in hunks
        for line in after.splitlines()
        if line not in before.splitlines()
    ]


def _name(block: str) -> str:
    return block.splitlines()[0].removeprefix("--- ").removesuffix(".py")


def _bodies(block: str) -> list[str]:
    return re.split(r"^@@.*@@\n", block, flags=re.MULTILINE)[1:]


def _hunk(body: str) -> Hunk:
    lines = body.splitlines()
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    return "\n".join(before) + "\n", "\n".join(after) + "\n"
