"""Rows of measurements as JSON or as a Markdown table."""

import json
from collections.abc import Sequence
from typing import Any

from tools.bench.measure import Row

COMMON = ("shape", "batch", "precision", "threads", "baseline_ms", "ours_ms", "ratio")


def as_json(rows: Sequence[Row]) -> str:
    """Return a list of objects; all have the COMMON keys, null if a measurement lacks one."""
    return json.dumps([dict.fromkeys(COMMON) | row for row in rows], indent=1)


def as_table(rows: Sequence[Row]) -> str:
    """Return a Markdown table with a line per row and a column per key of any row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    lines = [_line(line, widths) for line in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(text.rjust(width) for text, width in zip(cells, widths, strict=True)) + " |"


def cell(value: Any) -> str:
    """Return a value as text, with three significant digits if it is not a whole number."""
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
