"""What MkDocs does not do by itself: links that leave docs/, and formulas without a network.

The Markdown files are read on code hosts too, so a link to a source file, or to a folder, is a path
in the repository. Here everything that is linked so becomes a page below `repository/`.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
DOCS, COPIES = ROOT / "docs", "repository"
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
ROLE = re.compile(r":math:`(.*?)`", re.DOTALL)
DIRECTIVE = re.compile(r"^( *)\.\. math:: (.*(?:\n(?:\1 +.*)?)*)", re.MULTILINE)
DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.MULTILINE)
LANGUAGES = {".py": "python", ".toml": "toml", ".cfg": "ini", ".ini": "ini"}


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(DocstringNotation())  # type: ignore[arg-type]


# ---- links that leave docs/ ----


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add a page for every file outside docs/ that a page, or the navigation, leads to."""
    waiting = [DOCS / file.src_uri for file in files.documentation_pages()]
    waiting += [ROOT / path for path in _copies_in(config.nav)]
    for path in waiting:  # grows
        copied = _uri(path).startswith(f"{COPIES}/")
        if copied and files.get_file_from_path(_uri(path)) is None:
            files.append(File.generated(config, _uri(path), content=_page(path)))
        waiting += [target for target in _targets(path) if target not in waiting]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links that leave docs/, and those of the copies, to where their targets are."""
    source = _source(page.file.src_uri)

    def rewrite(match: re.Match[str]) -> str:
        target = _resolved(source, match[2])
        if target is None:
            return match[0]
        here = os.path.dirname(page.file.src_uri)
        return match[1] + os.path.relpath(_uri(target), here) + match[3]

    return LINK.sub(rewrite, markdown)


def _copies_in(nav: Any) -> Iterator[str]:
    if isinstance(nav, str) and nav.startswith(f"{COPIES}/"):
        yield nav.removeprefix(f"{COPIES}/")
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _copies_in(part)


def _targets(path: Path) -> Iterator[Path]:
    """What a page leads to, or a folder holds."""
    if path.is_dir():
        yield from _listed(path)
    if path.suffix != ".md":
        return
    for match in LINK.finditer(path.read_text(encoding="utf-8")):
        target = _resolved(path, match[2])
        if target is not None:
            yield target


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")


def _resolved(source: Path, link: str) -> Path | None:
    """The file or folder of the repository that a link in ``source`` means, if it is one."""
    target = Path(os.path.normpath(source.parent / link))
    return target if target.exists() and ROOT in target.parents else None


def _uri(path: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    if path.is_dir():
        readme = path / "README.md"
        path = readme if readme.is_file() else path / "index.md"
    if path.is_file() and path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = f"{COPIES}/{path.relative_to(ROOT).as_posix()}"
    return name if path.suffix == ".md" else f"{name}.md"


def _source(uri: str) -> Path:
    """The inverse of `_uri`."""
    if not uri.startswith(f"{COPIES}/"):
        return DOCS / uri
    path = ROOT / uri.removeprefix(f"{COPIES}/")
    return path.with_suffix("") if path.with_suffix("").is_file() else path


def _page(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return "\n".join([f"# {name}/", "", *(f"- [{p.name}]({p.name})" for p in _listed(path))])
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    language = LANGUAGES.get(path.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n````{language}\n{text}````\n"


# ---- formulas ----


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML, which browsers draw themselves."""
    return FORMULA.sub(_mathml, html_text)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    mathml = convert(html.unescape(match["latex"]).strip(), display=display)
    tag = match["tag"]
    return f'<{tag} class="formula">{mathml}</{tag}>'


# ---- docstrings ----


class DocstringNotation(Extension):
    """Sphinx's formulas, and doctests, in the notation of the Markdown files."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Notation(md), "docstring_notation", 28)


class _Notation(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        text = DIRECTIVE.sub(_display, "\n".join(lines))
        text = ROLE.sub(lambda match: f"${' '.join(match[1].split())}$", text)
        return DOCTEST.sub(r"\1```pycon\n\g<0>\n\1```", text).split("\n")


def _display(match: re.Match[str]) -> str:
    formula = " ".join(match[2].split())
    return f"\n{match[1]}$${formula}$$\n\n"
