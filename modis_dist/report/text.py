"""Names that come from data or configuration, made fit to be shown: one line, nothing a terminal would obey."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

from modis_dist.metrics import LOWER_IS_BETTER


def plain(name: object, *, limit: int = 60) -> str:
    """The name with control, format and other unprintable characters as escapes, at most ``limit`` characters.

    A longer one is cut in the middle: names that begin alike, as those of one panel do, can still be told apart.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))
    if len(text) <= limit:
        return text
    end = (limit - 3) // 2
    return f"{text[: limit - 3 - end]}...{text[-end:]}"


def settings(params: Mapping[str, Any], keys: Iterable[str] | None = None) -> str:
    """``lr=0.001, beta=1e-06``: dotted keys by their last part where that is clear; all keys by default."""
    shown = [key for key in (params if keys is None else keys) if key in params]
    last = [key.rpartition(".")[2] for key in shown]
    names = [short if last.count(short) == 1 else key for key, short in zip(shown, last, strict=True)]
    return ", ".join(f"{plain(name)}={plain(_value(params[key]))}" for name, key in zip(names, shown, strict=True))


def varying(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted keys whose value differs between the rows' ``params``, in the order they appear."""
    keys = dict.fromkeys(key for row in rows for key in row["params"])
    return [key for key in keys if any(row["params"].get(key) != rows[0]["params"].get(key) for row in rows)]


def best_of_each_condition(rows: Sequence[Mapping[str, Any]], *, metric: str) -> set[int]:
    """Positions of the rows with the best ``mean`` of their ``condition``, the first of equals.

    A row with a trial missing, or that was pruned, is never the best.
    """
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best: dict[str, int] = {}
    for position, row in enumerate(rows):
        if row["mean"] is None or row["n"] < row["expected"] or row.get("pruned"):
            continue
        leader = best.get(row["condition"])
        if leader is None or sign * row["mean"] > sign * rows[leader]["mean"]:
            best[row["condition"]] = position
    return set(best.values())


def best_first(rows: Sequence[Mapping[str, Any]], *, metric: str) -> list[Mapping[str, Any]]:
    """Rows by their ``mean``: those trained to the end, the pruned (the latest first), those that lack a trial."""
    sign = 1 if metric in LOWER_IS_BETTER else -1

    def place(row: Mapping[str, Any]) -> tuple[bool, bool, float, float]:
        value = 0.0 if row["mean"] is None else sign * row["mean"]
        reached = row["pruned"]["epoch"] if row.get("pruned") else inf
        lacking = reached == inf and row["n"] < row["expected"]
        return row["mean"] is None, lacking, -reached, value

    return sorted(rows, key=place)


def best_in_order(rows: Sequence[Mapping[str, Any]], most: int, *, metric: str) -> list[Mapping[str, Any]]:
    """The best so many rows, in the order given."""
    kept = set(map(id, best_first(rows, metric=metric)[:most]))
    return [row for row in rows if id(row) in kept]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"  # no space, so that it is never wrapped
    return str(value)
