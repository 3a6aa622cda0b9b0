"""Names that come from data or configuration, made fit to be shown: one line, nothing a terminal would obey."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modis_dist.runtime.text import plain as plain


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


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"  # no space, so that it is never wrapped
    return str(value)
