"""A report as a list of blocks, written out as one self-contained HTML page or as Markdown."""

from __future__ import annotations

import base64
import dataclasses
import html
import re
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Paragraph:
    text: str


@dataclasses.dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells are text; columns after the first `left` ones are aligned to the right."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG file in the report's folder; `alt` says what it shows."""

    file: str
    alt: str


@dataclasses.dataclass(frozen=True)
class Quote:
    """Text of a model or a document, shown as it is."""

    label: str
    text: str


@dataclasses.dataclass(frozen=True)
class Fold:
    """Long material that is closed at first."""

    title: str
    text: str


Block = Heading | Paragraph | Bullets | Table | Picture | Quote | Fold

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def to_html(title: str, blocks: Sequence[Block], folder: Path) -> str:
    """One page without outside parts; pictures are read from `folder` and stand in the page."""
    body = "\n".join(_html(block, folder) for block in blocks)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{_escape(title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
    )


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same content; pictures are linked as files beside the Markdown file."""
    parts = [f"# {_plain(title)}", *(block_markdown(block) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_escape(item)}</li>" for item in items) + "</ul>"
        case Table(headers, rows, left):
            head = _html_row(headers, "th", left)
            body = "".join(_html_row(row, "td", left) for row in rows)
            table = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"
            return f'<div class="wide">{table}</div>'
        case Picture(file, alt):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            return f'<img alt="{_escape(alt)}" src="data:image/png;base64,{data}">'
        case Quote(label, text):
            return (
                f'<div class="quote"><div class="label">{_escape(label)}</div>'
                f"<pre>{_escape(text)}</pre></div>"
            )
        case Fold(title, text):
            return (
                f"<details><summary>{_escape(title)}</summary><pre>{_escape(text)}</pre></details>"
            )


def _html_row(cells: Sequence[str], tag: str, left: int) -> str:
    parts = [
        f"<{tag}{'' if place < left else ' class=number'}>{_escape(cell)}</{tag}>"
        for place, cell in enumerate(cells)
    ]
    return f"<tr>{''.join(parts)}</tr>"


def block_markdown(block: Block) -> str:
    """One block as Markdown."""
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _line(text)
        case Bullets(items):
            return "\n".join(f"- {_line(item)}" for item in items)
        case Table(headers, rows, left):
            rule = ["---" if place < left else "---:" for place in range(len(headers))]
            lines = [[_plain(cell) for cell in headers], rule]
            lines += [[_plain(cell) for cell in row] for row in rows]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Picture(file, alt):
            return f"![{_plain(alt)}]({file})"
        case Quote(label, text):
            return f"{_line(label)}\n\n{_fenced(text)}"
        case Fold(title, text):
            summary = f"<details>\n<summary>{_escape(title)}</summary>"
            return f"{summary}\n\n{_fenced(text)}\n\n</details>"


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any in the text, so that nothing ends it early."""
    text = _visible(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(longest + 1, 3)
    return f"{fence}text\n{text}\n{fence}"


def _plain(text: str) -> str:
    """Text on one line in which no character means anything to Markdown or HTML."""
    line = " ".join(_visible(text).split())
    line = re.sub(r"([\\`*_\[\]|~])", r"\\\1", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(text: str) -> str:
    """`_plain` where a line begins, so that it opens no heading or list."""
    line = re.sub(r"^([#+-])", r"\\\1", _plain(text))
    return re.sub(r"^(\d+)([.)])", r"\1\\\2", line)


def _escape(text: str) -> str:
    return html.escape(_visible(text))


def _visible(text: str) -> str:
    """Control characters, which HTML forbids, become the sign for an unknown character."""
    return _CONTROL.sub("\ufffd", text)


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1d1d1f;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .7rem; border-top: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .9rem; }
th { text-align: left; font-weight: 600; border-bottom: 2px solid #bbb; }
th, td { padding: .3rem 1.1rem .3rem 0; vertical-align: top; }
td { border-bottom: 1px solid #eee; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: .84rem/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.quote { margin: .5rem 0; padding: .45rem .8rem; background: #f6f6f7;
  border-left: 3px solid #c9c9ce; }
.label { font-size: .78rem; font-weight: 600; color: #55555c; margin-bottom: .15rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: .5rem; padding: .7rem .8rem; background: #f6f6f7; }
"""
