"""Pages of the report: cells, tables (also as CSV and JSON), numbered figures. Knows nothing of what they show.

page = Page(Path("report"))
page.add("## Results", "Test images, **all** seeds.")
page.table("scores", [{"arm": "A", "iou": 0.71}], [Column("arm"), Column("iou", "IoU")])
page.write("report")                                # report.md and report.html
"""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks import Block, Listing, Note, Picture, Table, as_blocks, fixed, write_markdown
from comparisons import Estimate
from html_page import write_html


@dataclass(frozen=True)
class Column:
    """A column of a table: key of the rows, heading (default: the key), digits after the point."""

    key: str
    head: str = ""
    digits: int = 3


def show(value: object, digits: int = 3, brief: bool = False) -> str:
    """Format a cell; `brief` gives the half width of an interval in place of its limits."""
    if isinstance(value, Estimate):
        return show_estimate(value, digits, brief)
    if value is None or value == "":
        return "–"
    if isinstance(value, float):
        return "–" if math.isnan(value) else fixed(value, digits)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def show_estimate(estimate: Estimate, digits: int, brief: bool) -> str:
    """Format a value with its interval, if it has one."""
    middle = fixed(estimate.value, digits)
    if math.isnan(estimate.low):
        return middle
    if brief:
        half = (estimate.high - estimate.low) / 2
        return f"{middle} ±{fixed(half, digits)}"
    return f"{middle} [{fixed(estimate.low, digits)}, {fixed(estimate.high, digits)}]"


def make_table(rows: Sequence[dict], columns: Sequence[Column], brief: bool = False) -> Table:
    """Format rows as a table; a column that no row has is left out."""
    shown = [column for column in columns if any(column.key in row for row in rows)]
    cells = []
    for row in rows:
        cells.append([show(row.get(column.key), column.digits, brief) for column in shown])
    heads = [column.head or column.key for column in shown]
    return Table(heads, cells, [is_numeric(rows, column.key) for column in shown])


def is_numeric(rows: Sequence[dict], key: str) -> bool:
    """Check whether a column has numbers and nothing else; cells may be empty."""
    values = [row.get(key) for row in rows]
    values = [value for value in values if value is not None and value != ""]
    return bool(values) and all(isinstance(value, (int, float, Estimate)) for value in values)


def plain_cells(row: dict) -> dict:
    """Make a row fit for CSV and JSON: an interval becomes two more columns, what is not finite becomes None."""
    cells = {}
    limits = {}
    for key, value in row.items():
        if isinstance(value, Estimate):
            cells[key] = value.value
            limits[f"{key}_low"] = value.low
            limits[f"{key}_high"] = value.high
        else:
            cells[key] = value
    cells |= limits
    for key, value in cells.items():
        if isinstance(value, float) and not math.isfinite(value):
            cells[key] = None
    return cells


def write_table(folder: Path, name: str, rows: Sequence[dict]) -> None:
    """Write rows as NAME.csv and NAME.json, with every digit."""
    flat = [plain_cells(row) for row in rows]
    (folder / f"{name}.json").write_text(json.dumps(flat, indent=1, ensure_ascii=False) + "\n")
    columns: dict[str, None] = {}
    for row in flat:
        columns.update(dict.fromkeys(row))
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(flat)


class Page:
    """A page that is being written, as blocks, with its tables and figures in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.blocks: list[Block] = []
        self.figures = 0

    def add(self, *blocks: Block | str) -> None:
        """Add blocks, and texts: "## Title" is a heading, any other a paragraph. Empty texts are left out."""
        for block in blocks:
            if isinstance(block, str):
                self.blocks.extend(as_blocks(block))
            else:
                self.blocks.append(block)

    def note(self, text: str) -> None:
        """Add a paragraph that is set off from the text."""
        self.blocks.append(Note(text))

    def items(self, items: Sequence[str]) -> None:
        """Add a list with bullets."""
        if items:
            self.blocks.append(Listing(tuple(items)))

    def figure(self, name: str, caption: str, draw: Callable[..., None], *args: object, **options: object) -> None:
        """Draw NAME.png with draw(path, ...) and add it with its caption."""
        self.figures += 1
        picture = Picture(name, self.figures, caption)
        draw(self.folder / picture.file, *args, **options)
        self.blocks.append(picture)

    def table(self, name: str, rows: Sequence[dict], columns: Sequence[Column]) -> None:
        """Write rows to NAME.csv and NAME.json and add the columns that the page shows."""
        write_table(self.folder, name, rows)
        self.show(rows, columns)

    def show(self, rows: Sequence[dict], columns: Sequence[Column], brief: bool = False) -> None:
        """Add a table without files. brief: half the width of an interval in place of its limits."""
        self.blocks.append(make_table(rows, columns, brief))

    def write(self, name: str) -> None:
        """Write the page as NAME.md, and as NAME.html with its pictures inside."""
        (self.folder / f"{name}.md").write_text(write_markdown(self.blocks), encoding="utf-8")
        (self.folder / f"{name}.html").write_text(write_html(self.blocks, self.folder), encoding="utf-8")
