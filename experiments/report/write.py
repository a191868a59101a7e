"""The report's files in a folder: tables by pandas, pictures by matplotlib, the page by jinja2."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.report.content import Figure, Record, Section, Source, Table
from experiments.report.summary import run_list
from experiments.tracking.whole_file import write_whole

TITLE = "l2l_implicit: what the runs show"
TYPES = {"csv": "text/csv", "md": "text/markdown", "tex": "application/x-tex",
         "svg": "image/svg+xml"}  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.fontsize": 9.5,
    "svg.hashsalt": "l2l_implicit",  # the same picture is the same file
}
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "≤": r"$\leq$", "–": r"\textendash{}", "†": r"$\dagger$",
    "<": r"$<$", ">": r"$>$", "|": r"$|$", "[": "{[}", "*": "{*}",
})  # fmt: skip
MARKDOWN = str.maketrans({"<": "&lt;", "&": "&amp;", **{c: f"\\{c}" for c in "\\|`[*~$"}})


def latex(text: str) -> str:
    """The text as LaTeX shows it as it is: two hyphens stay two."""
    return re.sub("-(?=-)", "-{}", text.translate(LATEX))


def markdown(text: str) -> str:
    """The text as Markdown shows it as it is; a `_` within a word is no markup there."""
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text.translate(MARKDOWN))


def write(folder: Path, sections: Sequence[Section], about: str, command: str) -> Path:
    """Write every table and figure, then the page, which needs no other file; its path.

    ``about`` says where the runs come from, and when; ``command`` makes the report.
    """
    files: dict[str, bytes] = {}
    named = [replace(section, items=[_written(item, files) for item in section.items])
             for section in sections]  # fmt: skip

    def data_uri(file: str) -> str:
        kind = TYPES[file.rpartition(".")[2]]
        return f"data:{kind};base64,{base64.b64encode(files[file]).decode()}"

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    templates.filters |= {"run_list": run_list, "data_uri": data_uri}
    page = templates.get_template("page.html.jinja").render(
        title=TITLE, sections=named, files=files, about=about, command=command
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "index.html": page.encode()}.items():
        write_whole(folder / name, content)
    return folder / "index.html"


def _written(item: Table | Figure, files: dict[str, bytes]) -> Table | Figure:
    """The item under a name that nothing else has, its contents put into the files."""
    taken = {file.rpartition(".")[0].lower() for file in files}
    tries = (item.name if n == 1 else f"{item.name}_{n}" for n in count(1))
    name = next(name for name in tries if name.lower() not in taken)
    notes = list(item.notes)
    files[f"{name}.csv"] = csv_text(item.records, item.source).encode()
    if isinstance(item, Table):
        files[f"{name}.md"] = markdown_text(item).encode()
        files[f"{name}.tex"] = latex_text(item).encode()
        return replace(item, name=name)
    try:
        files[f"{name}.png"], files[f"{name}.svg"] = pictures(item)
    except Exception as error:  # whatever matplotlib raises on numbers that no one foresaw
        why = f"{type(error).__name__}: {str(error)[:200]}"
        notes.append(f"Not drawn ({why}); the CSV file has the numbers.")
    return replace(item, name=name, notes=notes)


def pictures(figure: Figure) -> tuple[bytes, bytes]:
    """The figure's PNG and SVG."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font lacks a letter of a name, a number is huge
        drawing = figure.draw()
        png, svg = io.BytesIO(), io.BytesIO()
        drawing.savefig(png, format="png", dpi=160)
        drawing.set_layout_engine("none")  # it is laid out by now, and doing so takes the most time
        drawing.savefig(svg, format="svg", metadata={"Date": None})
    return png.getvalue(), svg.getvalue()


def csv_text(records: Sequence[Record], source: Source) -> str:
    """The raw values, a line a record; the command and the run ids are its last content."""
    own = {"source_command": source.command, "source_runs": run_list(source.runs)}
    frame = pd.DataFrame(records, dtype=object).assign(**own).map(
        # text that a spreadsheet would run as a formula begins with a quote
        lambda v: f"'{v}" if isinstance(v, str) and v.startswith(("=", "+", "-", "@")) else v
    )
    return frame.to_csv(index=False, na_rep="nan", lineterminator="\n")


def markdown_text(table: Table) -> str:
    """A pipe table; caption above, notes, command and runs below."""
    command, runs = table.source.command.replace("`", "'"), run_list(table.source.runs) or "none"
    caption, end, *notes = map(markdown, (table.caption, runs, *table.notes))
    return "\n\n".join([caption, markdown_grid(table), *notes, f"`{command}`; runs: {end}\n"])


def markdown_grid(table: Table) -> str:
    """The table's own lines."""
    frame = _frame(table, "**{}**", markdown)
    sides = ["left" if column.text else "right" for column in table.columns]
    return frame.to_markdown(index=False, colalign=sides, disable_numparse=True)


def latex_text(table: Table) -> str:
    """A ``table`` environment with booktabs rules."""
    text = _frame(table, r"\textbf{{{}}}", latex).to_latex(
        index=False, escape=False, caption=latex(table.caption),
        column_format="".join("l" if column.text else "r" for column in table.columns),
    )  # fmt: skip
    notes = "".join(f"\\par\\footnotesize {latex(note)}\n" for note in table.notes)
    runs = run_list(table.source.runs) or "none"
    head = f"% command: {table.source.command}\n% runs: {runs}\n% needs \\usepackage{{booktabs}}\n"
    return head + text.replace("\\end{table}", f"{notes}\\end{{table}}")


def _frame(table: Table, bold: str, escape: Callable[[str], str]) -> pd.DataFrame:
    rows = [[bold.format(escape(text)) if best else escape(text) for text, best in row]
            for row in table.cells()]  # fmt: skip
    headers = [escape(column.header) for column in table.columns]
    return pd.DataFrame(rows, columns=headers, dtype=object)
