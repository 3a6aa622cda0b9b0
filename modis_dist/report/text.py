"""Names from data or configuration as safe text: one line, without control characters."""

from collections.abc import Iterable, Sequence
from typing import Any

from modis_dist.report.study_results import Params
from modis_dist.runtime.text import plain


def settings(params: Params, keys: Iterable[str] | None = None) -> str:
    """Return e.g. ``lr=0.001, beta=1e-06``: keys shortened to their last part if unique; all keys by default."""
    shown = [key for key in (params if keys is None else keys) if key in params]
    last = [key.rpartition(".")[2] for key in shown]
    names = [short if last.count(short) == 1 else key for key, short in zip(shown, last, strict=True)]
    return ", ".join(f"{plain(name)}={plain(_value(params[key]))}" for name, key in zip(names, shown, strict=True))


def varying(params: Sequence[Params]) -> list[str]:
    """Return the dotted keys whose values differ, in order of appearance."""
    keys = dict.fromkeys(key for values in params for key in values)
    return [key for key in keys if any(values.get(key) != params[0].get(key) for values in params)]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_value, value)) + "]"  # no space, so that the terminal does not wrap it
    return str(value)
