"""What MLflow has of a run, read from its tables by hand, and what it should have."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

Points = list[tuple[str, int, int, float]]  # name, step, time in ms, value


def curves(database: Path, run: str) -> Points:
    """Every point of a run's curves."""
    query = "select key, step, timestamp, value from metrics where run_uuid = ? and key not like 'final/%'"
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as held:
        return sorted(held.execute(query, [run]))


def expected(journal: Sequence[dict[str, Any]]) -> Points:
    """The points of a trial's records."""
    return sorted((name, r["step"], r["time_ms"], value) for r in journal for name, value in r["values"].items())
