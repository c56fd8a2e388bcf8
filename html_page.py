"""Write blocks as one HTML file that needs no other: pictures and styles inside, no script, light, dark and in print.

page = write_html(blocks, Path("report"))     # the folder of the pictures
"""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from blocks import Block, Heading, Listing, Note, Paragraph, Picture, Table, plain_text, spans

LONG_TEXT = 30  # characters, from which on a column may not become narrow
STYLE = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --text: #1c2024; --faint: #5b6470; --line: #d7dce1; --raised: #f4f6f8; --link: #0b5cad; --mark: #d55e00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --text: #e4e7eb; --faint: #a3acb8; --line: #383f48; --raised: #1f242a; --link: #7cb8f2; --mark: #f0883e;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--text); font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; overflow-wrap: break-word; }
main > p, main > ul, main > blockquote { max-width: 50rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0.5rem 0 1rem; max-width: 50rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.8rem 0 0.8rem; padding-top: 0.8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; }
a { color: var(--link); }
code { font: 0.9em ui-monospace, monospace; background: var(--raised); padding: 0.1em 0.3em; border-radius: 0.25em; }
blockquote { margin: 1rem 0; padding: 0.6rem 1rem; border-left: 4px solid var(--mark); background: var(--raised); }
blockquote p { margin: 0; }
nav { margin: 1.5rem 0; padding: 0.8rem 1rem; background: var(--raised); border-radius: 0.4rem; font-size: 0.95rem; }
nav p { margin: 0 0 0.4rem; font-weight: 600; }
nav ul { margin: 0; padding-left: 1.2rem; columns: 18rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.87rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.5rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--faint); }
tbody th { font-weight: 500; background: var(--page); position: sticky; left: 0; min-width: 8rem; }
td { min-width: 3.5rem; max-width: 24rem; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
.words { min-width: 14rem; }
figure { margin: 1.5rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff; padding: 0.5rem; border-radius: 0.4rem; }
figcaption { margin-top: 0.5rem; max-width: 50rem; color: var(--faint); font-size: 0.9rem; }
@media (max-width: 40rem) {
  main { padding: 1rem 0.9rem 3rem; }
  h1 { font-size: 1.4rem; }
  figure img { max-width: none; width: 42rem; }
  tbody th { max-width: 9rem; }
}
@media print {
  :root { --page: #ffffff; --text: #000000; --faint: #333333; --line: #bbbbbb; --raised: #f4f6f8; --link: #000000; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td, .words { padding: 0.2rem 0.3rem; min-width: 0; overflow-wrap: anywhere; white-space: normal; }
  tbody th { position: static; min-width: 5rem; }
  h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  figure img { max-height: 20cm; padding: 0; }
}
"""


def write_html(blocks: Sequence[Block], folder: Path) -> str:
    """Write blocks as an HTML page. The contents, a list of the level-2 headings, stand before the first of them."""
    headings = [block for block in blocks if isinstance(block, Heading)]
    title = plain_text(headings[0].text) if headings else "Report"
    names = anchors(headings)
    waiting = iter(names)
    parts = []
    section = ""
    listed = False
    for block in blocks:
        if isinstance(block, Heading):
            section = next(waiting)
            if block.level == 2 and not listed:
                parts.append(contents(headings, names))
                listed = True
            parts.append(f'<h{block.level} id="{section}">{html_text(block.text)}</h{block.level}>')
        else:
            parts.append(html_block(block, section, folder))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
            *parts,
            "</main>\n</body>\n</html>\n",
        ]
    )


def anchors(headings: Sequence[Heading]) -> list[str]:
    """Name each heading after its words, for links to it."""
    names: list[str] = []
    for heading in headings:
        words = re.findall(r"[a-z0-9]+", plain_text(heading.text).lower())
        name = "-".join(words) or "section"
        while name in names:
            name += "-2"
        names.append(name)
    return names


def contents(headings: Sequence[Heading], names: Sequence[str]) -> str:
    """List the sections with links to them."""
    items = []
    for heading, name in zip(headings, names, strict=True):
        if heading.level == 2:
            items.append(f'<li><a href="#{name}">{html_text(heading.text)}</a></li>')
    return '<nav aria-label="Contents">\n<p>Contents</p>\n<ul>\n' + "\n".join(items) + "\n</ul>\n</nav>"


def html_block(block: Block, section: str, folder: Path) -> str:
    """Write a block that is no heading; section: the name of the heading that it stands under."""
    if isinstance(block, Paragraph):
        return f"<p>{html_text(block.text)}</p>"
    if isinstance(block, Note):
        return f"<blockquote><p>{html_text(block.text)}</p></blockquote>"
    if isinstance(block, Listing):
        items = [f"<li>{html_text(item)}</li>" for item in block.items]
        return "<ul>\n" + "\n".join(items) + "\n</ul>"
    if isinstance(block, Table):
        return html_table(block, section)
    return html_picture(block, folder)


def html_table(table: Table, section: str) -> str:
    """Write a table in an element that scrolls sideways, by touch or by keyboard."""
    kinds = column_kinds(table)
    lines = [f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{section}">', "<table>", "<thead>"]
    heads = [html_cell('th scope="col"', head, kind) for head, kind in zip(table.heads, kinds, strict=True)]
    lines += [html_row(heads), "</thead>", "<tbody>"]
    for row in table.rows:
        cells = [html_cell("td", cell, kind) for cell, kind in zip(row, kinds, strict=True)]
        cells[0] = html_cell('th scope="row"', row[0], kinds[0])
        lines.append(html_row(cells))
    lines += ["</tbody>", "</table>", "</div>"]
    return "\n".join(lines)


def column_kinds(table: Table) -> list[str]:
    """Classify columns for the style sheet: "number", "words" for long texts, or "" for short ones."""
    kinds = []
    for place, numeric in enumerate(table.numeric):
        longest = max((len(row[place]) for row in table.rows), default=0)
        if numeric:
            kinds.append("number")
        elif place > 0 and longest > LONG_TEXT:
            kinds.append("words")
        else:
            kinds.append("")
    return kinds


def html_row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def html_cell(start: str, text: str, kind: str) -> str:
    """Write a cell; start: its tag, with attributes."""
    tag = start.split()[0]
    style = f' class="{kind}"' if kind else ""
    return f"<{start}{style}>{escape(text)}</{tag}>"


def html_picture(picture: Picture, folder: Path) -> str:
    """Write a figure with its picture inside; the caption is also what a screen reader says in its place."""
    data = base64.b64encode((folder / picture.file).read_bytes()).decode()
    alt = escape(f"Figure {picture.number}. {plain_text(picture.caption)}")
    image = f'<img alt="{alt}" src="data:image/png;base64,{data}">'
    caption = html_text(f"**Figure {picture.number}.** {picture.caption}")
    return f'<figure>\n<div class="scroll">{image}</div>\n<figcaption>{caption}</figcaption>\n</figure>'


def html_text(text: str) -> str:
    """Write a text as HTML."""
    parts = []
    for span in spans(text):
        if span.style == "code":
            parts.append(f"<code>{escape(span.text)}</code>")
        elif span.style == "strong":
            parts.append(f"<strong>{html_text(span.text)}</strong>")
        else:
            parts.append(escape(span.text))
    return "".join(parts)
