"""Names, values and Markdown tables in the form that MLflow accepts. Pure functions without MLflow."""

import hashlib
import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from modis_dist.runtime.text import markdown

MAX_VALUE = 500  # limit of the strictest servers
MAX_NAME = 250
MAX_TABLE = 3500  # characters; a whole note may have 8000
MAX_ROWS = 100


def key(name: str) -> str:
    """Return a metric or parameter name that MLflow accepts; a changed name ends in a hash and stays unique."""
    clean = posixpath.normpath(re.sub(r"[^\w.\- /]", "_", name)).lstrip("./ ")
    if clean and clean == name and len(name) <= MAX_NAME:
        return name
    return f"{clean[: MAX_NAME - 9]}-{_hash(name)[:8]}".lstrip("-")


def value(content: Any) -> str:
    """Return the text of a parameter or tag, at most 500 characters; a longer one is cut and ends in its hash."""
    text = content if isinstance(content, str) else json.dumps(content, default=str)
    if len(text) <= MAX_VALUE:
        return text
    return f"{text[: MAX_VALUE - 30]}... sha256:{_hash(text)[:16]}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the parameters of a nested tree by dotted key."""
    params: dict[str, str] = {}
    for name, content in tree.items():
        if isinstance(content, Mapping):
            params |= flat(content, f"{prefix}{name}.")
        else:
            params[key(f"{prefix}{name}")] = value(content)
    return params


def number(metric: float) -> str:
    """Return a number with four significant digits."""
    return f"{metric:.4g}"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table of the rows; rows beyond the size limit are counted."""
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
    """Return a Markdown table of metrics."""
    return table([{"metric": name, "value": number(metric)} for name, metric in metrics.items()])


def plain(text: str) -> str:
    """Return text escaped for Markdown, on one line."""
    return markdown(" ".join(text.split()))


def _line(cells: Sequence[str], *, escaped: bool = True) -> str:
    return "| " + " | ".join(plain(cell) if escaped else cell for cell in cells) + " |"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
