"""A report as headings, paragraphs, tables, pictures and code; here as Markdown, in `html.py` as one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Table:
    """The first column holds names, the others figures unless `words`."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    path: Path
    caption: str
    wide: bool = False
    """Whether it is to be scrolled, not shrunk, where the screen is narrow."""


@dataclass(frozen=True)
class Sides:
    """One picture, and others of its size that are compared with it: laid over it one at a time, or on paper side by side."""

    first: Picture
    others: Sequence[Picture]
    """At least one."""
    caption: str


@dataclass(frozen=True)
class Code:
    text: str
    summary: str = ""
    """Folded away under this line where the form can."""


Block = Heading | Text | Table | Picture | Sides | Code


@dataclass(frozen=True)
class Document:
    title: str
    lead: str
    """What matters, in a few sentences."""
    blocks: Sequence[Block]


def markdown(document: Document) -> str:
    """Markdown; pictures are files beside it."""
    parts = [f"# {document.title}", document.lead]
    for block in document.blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Text(text):
                parts.append(text)
            case Table(header, rows, words):
                rule = "|---" + ("|---" if words else "|---:") * (len(header) - 1) + "|"
                lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, *rows)]
                parts.append("\n".join([lines[0], rule, *lines[1:]]))
            case Picture(path, caption):
                parts.append(f"![{caption}]({path.name})")
            case Sides(first, others, caption):
                parts += [caption, *(f"{picture.caption}:\n\n![{picture.caption}]({picture.path.name})" for picture in (first, *others))]
            case Code(text, summary):
                parts.append(f"{summary + chr(10) * 2 if summary else ''}```\n{text}\n```")
    return "\n\n".join(parts) + "\n"
