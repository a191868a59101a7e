"""The report's files in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.report.content import Figure, Section, Table
from experiments.report.drawing import pictures
from experiments.report.page import page
from experiments.report.table_text import csv_text, latex_text, markdown_text

PAGE = "index.html"


def write(folder: Path, sections: Sequence[Section], about: str, command: str) -> Path:
    """Write every table and figure, then the page; its path.

    Raises:
        OSError: the folder cannot be written.
    """
    files: dict[str, bytes] = {}
    for section in sections:
        for item in section.items:
            files |= _table(item) if isinstance(item, Table) else _figure(item)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    path = folder / PAGE
    path.write_text(page(sections, files, about, command), encoding="utf-8")
    return path


def _table(table: Table) -> dict[str, bytes]:
    return {
        f"{table.name}.csv": csv_text(table.records, table.source).encode(),
        f"{table.name}.md": markdown_text(table).encode(),
        f"{table.name}.tex": latex_text(table).encode(),
    }


def _figure(figure: Figure) -> dict[str, bytes]:
    png, svg = pictures(figure)
    data = csv_text(figure.records, figure.source).encode()
    return {f"{figure.name}.png": png, f"{figure.name}.svg": svg, f"{figure.name}.csv": data}
