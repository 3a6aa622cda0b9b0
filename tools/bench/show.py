"""Rows of measurements as JSON, or as a table that is read on a terminal and pasted into a page."""

import json
from collections.abc import Sequence
from typing import Any

from tools.bench.measure import Row

COMMON = ("shape", "batch", "precision", "threads", "baseline_ms", "ours_ms", "ratio")


def as_json(rows: Sequence[Row]) -> str:
    """A list of objects; all of them have the COMMON keys, null where a measurement has no such thing."""
    return json.dumps([dict.fromkeys(COMMON) | row for row in rows], indent=1)


def as_table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each row, a column for each key that any of them has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    lines = [_line(line, widths) for line in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(text.rjust(width) for text, width in zip(cells, widths, strict=True)) + " |"


def cell(value: Any) -> str:
    """A value, of three digits where it is not a whole number."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "NO"
        case float() if abs(value) >= 1000:
            return f"{value:,.0f}"
        case float():
            return f"{value:.3g}"
        case _:
            return str(value)
