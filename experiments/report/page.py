"""One HTML page with everything in it: pictures and files are data URIs."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from experiments.report.content import Figure, Section, Source, Table
from experiments.report.differences import run_list
from experiments.report.page_style import STYLE
from experiments.report.table_text import shown_cells

TITLE = "l2l_implicit: what the runs show"
LONG = 32
"""Characters from which a cell's text is broken into lines."""
TYPES = {"csv": "text/csv", "md": "text/markdown", "tex": "application/x-tex",
         "svg": "image/svg+xml"}  # fmt: skip

Files = Mapping[str, bytes]
"""The content of every file of the report by its name."""


def page(sections: Sequence[Section], files: Files, about: str, command: str) -> str:
    """The page.

    Args:
        files: tables' and figures' files, as they are beside the page.
        about: where the runs come from, and when.
        command: that makes the report.
    """
    links = "".join(f'<li><a href="#{_slug(s.title)}">{escape(s.title)}</a></li>' for s in sections)
    body = "".join(_section(section, files) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{TITLE}</h1>\n<p class="meta">{escape(about)} Drawn by '
        f"<code>{escape(command)}</code>.</p></header>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>{body}</main>\n'
        "</body>\n</html>\n"
    )


def _section(section: Section, files: Files) -> str:
    text = "".join(f"<p>{escape(line)}</p>" for line in section.text)
    items = "".join(
        _table(item, files) if isinstance(item, Table) else _figure(item, files)
        for item in section.items
    )
    title = escape(section.title)
    return f'\n<section><h2 id="{_slug(section.title)}">{title}</h2>{text}{items}</section>'


def _table(table: Table, files: Files) -> str:
    head = "".join(
        f'<th scope="col"{_class(column.text)}>{escape(column.header)}</th>'
        for column in table.columns
    )
    words = [column.text for column in table.columns]
    rows = "".join(f"<tr>{_row(cells, words)}</tr>\n" for cells in shown_cells(table))
    grid = (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    below = _notes(table.notes) + _source(table.source, _links(table.name, files))
    caption = escape(table.caption)
    if table.folded:
        return f'<details class="item"><summary>{caption}</summary>{grid}{below}</details>'
    return f'<div class="item"><p class="caption">{caption}</p>{grid}{below}</div>'


def _row(cells: Iterable[tuple[str, bool]], words: Sequence[bool]) -> str:
    shown = []
    for (text, best), is_text in zip(cells, words, strict=True):
        content = f"<strong>{escape(text)}</strong>" if best else escape(text)
        shown.append(f"<td{_class(is_text, len(text) > LONG)}>{content}</td>")
    return "".join(shown)


def _class(is_text: bool, long: bool = False) -> str:
    if not is_text:
        return ' class="number"'
    return ' class="long"' if long else ""


def _figure(figure: Figure, files: Files) -> str:
    svg = _data_uri(f"{figure.name}.svg", files)
    caption = escape(figure.caption)
    return (
        f'<figure class="item"><div class="wide"><img src="{svg}" alt="{caption}"></div>'
        f"<figcaption>{caption}</figcaption>{_notes(figure.notes)}"
        f"{_source(figure.source, _links(figure.name, files))}</figure>"
    )


def _notes(notes: Iterable[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _source(source: Source, links: str) -> str:
    listed = run_list(source.runs).replace("-", "\N{NON-BREAKING HYPHEN}")
    word = "runs" if len(source.runs) > 1 else "run"
    runs = f"{word} {escape(listed)}" if source.runs else "no runs"
    return f'<p class="source"><code>{escape(source.command)}</code> · {runs} · {links}</p>'


def _links(name: str, files: Files) -> str:
    """The files of a table or figure, inside the page; a PNG only by its name, for its size."""
    found = []
    for kind in ("csv", "tex", "md", "svg", "png"):
        file = f"{name}.{kind}"
        if file in files and kind in TYPES and kind != "svg":
            found.append(f'<a download="{file}" href="{_data_uri(file, files)}">{kind}</a>')
        elif file in files:
            found.append(f"<code>{escape(file)}</code>")
    return " · ".join(found)


def _data_uri(file: str, files: Files) -> str:
    kind = TYPES[file.rpartition(".")[2]]
    return f"data:{kind};base64,{base64.b64encode(files[file]).decode()}"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
