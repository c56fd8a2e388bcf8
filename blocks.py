"""Blocks of a page, and the Markdown that is written from them. html_page.py writes the same blocks as HTML.

    write_markdown([Heading("Results", 2), Paragraph("All **9** runs finished.")])

Texts use two signs of Markdown, **strong** and `code`; a backslash before *, ` or another backslash takes its meaning
away. Everything else stands for itself and is escaped by the writers. literal() prepares text of unknown origin.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MARKS = re.compile(r"\\(?P<literal>[\\`*])|`(?P<code>[^`]+)`|\*\*(?P<strong>(?:\\[\\`*]|[^*])+)\*\*")
# What Markdown would read as an escape, code, emphasis, strike-through, HTML, a character reference or a link.
MARKDOWN_SIGNS = re.compile(r"[\\`*<|]|~(?=~)|&(?=#?\w+;)|\](?=[\[(])|(?<!\w)_|_(?!\w)")


def fixed(value: float, digits: int, sign: str = "") -> str:
    """Format a number; what rounds to zero has no minus sign. sign: "+" writes the plus as well."""
    text = f"{value:{sign}.{digits}f}"
    if float(text) == 0:
        return f"{0.0:{sign}.{digits}f}"
    return text


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the page's title."""

    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph that is set off from the text."""

    text: str


@dataclass(frozen=True)
class Listing:
    """A list with a bullet for each item."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Headings and rows of cells, all plain text. numeric: for each column, whether it holds numbers only."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]


@dataclass(frozen=True)
class Picture:
    """A numbered figure: NAME.png beside the page."""

    name: str
    number: int
    caption: str

    @property
    def file(self) -> str:
        return f"{self.name}.png"


Block = Heading | Paragraph | Note | Listing | Table | Picture


def as_blocks(text: str) -> Iterator[Block]:
    """Split a text at its empty lines into headings, which start with number signs, and paragraphs."""
    for part in text.split("\n\n"):
        signs = re.match(r"(#+) ", part)
        if signs:
            yield Heading(part[signs.end() :].strip(), len(signs[1]))
        elif part.strip():
            yield Paragraph(part.strip())


# ----------------------------------------------------------------------------------------------------------------------
# Text


class Span(NamedTuple):
    """A piece of text; style: "", "code" or "strong", whose text may have spans of its own."""

    style: str
    text: str


def literal(value: object) -> str:
    """Write a value so that no sign in it has a meaning and no line of it ends."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*])", r"\\\1", text)


def spans(text: str) -> list[Span]:
    """Split a text into spans of one style."""
    found: list[Span] = []
    plain = ""
    position = 0
    for match in MARKS.finditer(text):
        plain += text[position : match.start()]
        position = match.end()
        if match.lastgroup == "literal":
            plain += match["literal"]
            continue
        found += [Span("", plain), Span(match.lastgroup, match[match.lastgroup])]
        plain = ""
    found.append(Span("", plain + text[position:]))
    return [span for span in found if span.text]


def plain_text(text: str) -> str:
    """Return a text without its marks."""
    parts = []
    for span in spans(text):
        parts.append(plain_text(span.text) if span.style == "strong" else span.text)
    return "".join(parts)


# ----------------------------------------------------------------------------------------------------------------------
# Markdown


def write_markdown(blocks: Iterable[Block]) -> str:
    """Write blocks as a Markdown page."""
    return "\n\n".join(markdown_block(block) for block in blocks) + "\n"


def markdown_block(block: Block) -> str:
    """Write a block as Markdown."""
    if isinstance(block, Heading):
        return f"{'#' * block.level} {markdown_text(block.text)}"
    if isinstance(block, Note):
        return f"> {markdown_text(block.text)}"
    if isinstance(block, Listing):
        return "\n".join(f"- {markdown_text(item)}" for item in block.items)
    if isinstance(block, Table):
        return markdown_table(block)
    if isinstance(block, Picture):
        caption = markdown_text(f"Figure {block.number}. {block.caption}")
        return f"![Figure {block.number}]({block.file})\n\n*{caption}*"
    return markdown_text(block.text)


def markdown_table(table: Table) -> str:
    """Write a table; columns of numbers are aligned to the right."""
    rules = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [[escape_markdown(head) for head in table.heads], rules]
    for row in table.rows:
        lines.append([escape_markdown(cell) for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_text(text: str) -> str:
    """Write a text as Markdown."""
    parts = []
    for span in spans(text):
        if span.style == "code":
            parts.append(f"`{span.text}`")
        elif span.style == "strong":
            parts.append(f"**{markdown_text(span.text)}**")
        else:
            parts.append(escape_markdown(span.text))
    return "".join(parts)


def escape_markdown(text: str) -> str:
    """Take the meaning away from the signs in plain text, and from its line breaks."""
    return MARKDOWN_SIGNS.sub(r"\\\g<0>", re.sub(r"\s+", " ", text))
