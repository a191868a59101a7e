"""A table as CSV, Markdown and LaTeX text, each with its command and run ids."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from experiments.report.content import Record, Source, Table
from experiments.report.differences import run_list

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "≤": r"$\leq$", "–": "--", "†": r"$\dagger$", "<": r"$<$", ">": r"$>$",
    "|": r"$|$",
}  # fmt: skip


def csv_text(records: Sequence[Record], source: Source) -> str:
    """The raw values, a line a record; the command and the run ids are its last columns."""
    own = {"source_command": source.command, "source_runs": run_list(source.runs)}
    rows = [{**record, **own} for record in records]
    keys = list(dict.fromkeys(key for row in rows for key in row)) or list(own)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, keys, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def markdown_text(table: Table) -> str:
    """A pipe table; caption above, notes, command and runs below."""
    lines = [table.caption, "", _pipes(_escape_pipe(c.header) for c in table.columns)]
    lines.append("|" + "|".join("---" if c.text else "---:" for c in table.columns) + "|")
    lines += [_pipes(cells) for cells in _cells(table, "**{}**", _escape_pipe)]
    notes = [line for note in table.notes for line in ("", note)]
    runs = run_list(table.source.runs) or "none"
    return "\n".join([*lines, *notes, "", f"`{table.source.command}`; runs: {runs}", ""])


def latex_text(table: Table) -> str:
    """A ``table`` environment with booktabs rules."""
    body = [" & ".join(cells) + r" \\" for cells in _cells(table, r"\textbf{{{}}}", latex)]
    notes = [rf"\par\footnotesize {latex(note)}" for note in table.notes]
    lines = [
        f"% command: {table.source.command}",
        f"% runs: {run_list(table.source.runs) or 'none'}",
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{latex(table.caption)}}}",
        rf"\begin{{tabular}}{{{''.join('l' if c.text else 'r' for c in table.columns)}}}",
        r"\toprule",
        " & ".join(latex(column.header) for column in table.columns) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *notes,
        r"\end{table}",
    ]
    return "\n".join([*lines, ""])


def latex(text: str) -> str:
    """Text with what is special to LaTeX escaped."""
    return "".join(LATEX.get(character, character) for character in text)


def shown_cells(table: Table) -> Iterable[list[tuple[str, bool]]]:
    """By row, each cell's text and whether it is bold."""
    best = {column: table.best_rows(column) for column in table.columns}
    for number, record in enumerate(table.records):
        yield [(column.show(record), number in best[column]) for column in table.columns]


def _cells(table: Table, bold: str, escape: Callable[[str], str]) -> Iterable[list[str]]:
    for row in shown_cells(table):
        yield [bold.format(escape(text)) if best else escape(text) for text, best in row]


def _pipes(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape_pipe(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
