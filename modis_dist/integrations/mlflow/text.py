"""Our names, values and tables in the form that MLflow takes. Pure functions; must not know MLflow itself."""

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modis_dist.runtime.text import markdown

MAX_VALUE = 500  # what the strictest servers take
MAX_NAME = 250
MAX_TABLE = 3500  # characters; MLflow takes 8000 for a whole note
MAX_ROWS = 100


def key(name: str) -> str:
    """A name of a metric or parameter with the characters MLflow takes; a changed one ends in a hash to stay unique."""
    clean = posixpath.normpath(re.sub(r"[^\w.\- /]", "_", name)).lstrip("./ ")
    if clean and clean == name and len(name) <= MAX_NAME:
        return name
    return f"{clean[: MAX_NAME - 9]}-{_hash(name)[:8]}".lstrip("-")


def value(held: Any) -> str:
    """Text of a parameter or tag of at most 500 characters; a longer one is cut and ends in its hash."""
    text = held if isinstance(held, str) else json.dumps(held, default=str)
    if len(text) <= MAX_VALUE:
        return text
    return f"{text[: MAX_VALUE - 30]}... sha256:{_hash(text)[:16]}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Parameters of a nested tree by dotted key."""
    found: dict[str, str] = {}
    for name, held in tree.items():
        if isinstance(held, Mapping):
            found |= flat(held, f"{prefix}{name}.")
        else:
            found[key(f"{prefix}{name}")] = value(held)
    return found


def number(held: float) -> str:
    """A number as a table shows it."""
    return f"{held:.4g}"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of all columns of the rows; the rows that do not fit are counted."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [_line(columns), _line(["---"] * len(columns), escaped=False)]
    for shown, row in enumerate(rows):
        line = _line([row.get(name, "") for name in columns])
        if shown == MAX_ROWS or len("\n".join([*lines, line])) > MAX_TABLE:
            return "\n".join([*lines, f"\nand {len(rows) - shown} more"])
        lines.append(line)
    return "\n".join(lines)


def numbers(metrics: Mapping[str, float]) -> str:
    """A Markdown table of single numbers."""
    return table([{"metric": name, "value": number(held)} for name, held in metrics.items()])


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return markdown(" ".join(text.split()))


def _line(cells: Sequence[str], *, escaped: bool = True) -> str:
    return "| " + " | ".join(plain(cell) if escaped else cell for cell in cells) + " |"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
