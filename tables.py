"""Pages of the report: cells, tables in Markdown, CSV and JSON, numbered figures. Knows nothing of what they show."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from comparisons import Estimate


@dataclass(frozen=True)
class Column:
    """A column of a Markdown table: key of the rows, heading (default: the key), digits after the point."""

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
        return "–" if math.isnan(value) else f"{value:.{digits}f}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "/")


def show_estimate(estimate: Estimate, digits: int, brief: bool) -> str:
    """Format a value with its interval, if it has one."""
    middle = f"{estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return middle
    if brief:
        half = (estimate.high - estimate.low) / 2
        return f"{middle} ±{half:.{digits}f}"
    return f"{middle} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def markdown(rows: Sequence[dict], columns: Sequence[Column], brief: bool = False) -> str:
    """Draw rows as a Markdown table; a column that no row has is left out."""
    shown = [column for column in columns if any(column.key in row for row in rows)]
    lines = [[column.head or column.key for column in shown], ["---" for _ in shown]]
    for row in rows:
        lines.append([show(row.get(column.key), column.digits, brief) for column in shown])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    """A Markdown page that is being written, with its tables and figures in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.parts: list[str] = []
        self.figures = 0

    def add(self, *blocks: str) -> None:
        """Add blocks of Markdown; empty ones are left out."""
        self.parts.extend(block.rstrip() + "\n" for block in blocks if block)

    def figure(self, name: str, caption: str, draw: Callable[..., None], *args, **options) -> None:
        """Draw NAME.png with draw(path, ...) and add it with its caption."""
        self.figures += 1
        draw(self.folder / f"{name}.png", *args, **options)
        self.add(f"![Figure {self.figures}]({name}.png)", f"*Figure {self.figures}. {caption}*")

    def table(self, name: str, rows: Sequence[dict], columns: Sequence[Column]) -> None:
        """Write rows to NAME.csv and NAME.json and add the columns that the page shows."""
        write_table(self.folder, name, rows)
        self.add(markdown(rows, columns))

    def write(self, name: str) -> None:
        """Write the page."""
        (self.folder / name).write_text("\n".join(self.parts))
