"""Rows of a study in MLflow's own tables, and the rows that are expected."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Points = list[tuple[str, int, int, float]]  # name, step, time in ms, value


@dataclass(frozen=True)
class Run:
    """One run."""

    id: str
    name: str
    status: str
    tags: dict[str, str]


def query(database: Path, text: str, *values: object) -> list[Any]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(text, values).fetchall()


def runs(database: Path) -> list[Run]:
    """Return every run that is not deleted."""
    rows = query(database, "select run_uuid, name, status from runs where lifecycle_stage = 'active'")
    return [Run(*row, dict(query(database, "select key, value from tags where run_uuid = ?", row[0]))) for row in rows]


def parent_and_trials(database: Path, study: str | None = None) -> tuple[Run, dict[str, Run]]:
    """Return the only parent run (of a study) and the nested runs by trial."""
    matching = [run for run in runs(database) if study in (None, run.tags["modis.study_id"])]
    (parent,) = [run for run in matching if "modis.trial_id" not in run.tags]
    trials = {run.tags["modis.trial_id"]: run for run in matching if run is not parent}
    assert len(trials) == len(matching) - 1
    assert all(run.tags["mlflow.parentRunId"] == parent.id for run in trials.values())
    return parent, trials


def curves(database: Path, run: str) -> Points:
    """Return every point of a run's curves."""
    text = "select key, step, timestamp, value from metrics where run_uuid = ? and key not like 'final/%'"
    return sorted(query(database, text, run))


def expected(journal: Sequence[dict[str, Any]]) -> Points:
    """Return the points of a trial's records."""
    return sorted((name, r["step"], r["time_ms"], value) for r in journal for name, value in r["values"].items())


def every_row(database: Path) -> dict[str, list[Any]]:
    """Return all rows of the database."""
    tables = [name for (name,) in query(database, "select name from sqlite_master where type = 'table'")]
    return {name: sorted(query(database, f'select * from "{name}"'), key=repr) for name in tables}


def content(database: Path, folder: Path) -> dict[str, list[Any]]:
    """Return all rows about the study of a folder, without MLflow's random ids, end times and the folder."""
    queries = {
        "runs": "select name, status from runs",
        "params": "select r.name, p.key, p.value from params p join runs r using (run_uuid)",
        "metrics": "select r.name, m.key, m.step, m.timestamp, m.value from metrics m join runs r using (run_uuid)",
        "tags": "select r.name, t.key, replace(t.value, ?, '') from tags t join runs r using (run_uuid) "
        "where t.key <> 'mlflow.parentRunId'",
        "models": "select status from logged_models where lifecycle_stage = 'active'",
        "of models": "select metric_name, metric_value from logged_model_metrics",
    }
    rows = {name: query(database, text, *[str(folder)] * text.count("?")) for name, text in queries.items()}
    artifacts = [path for path in (folder / "mlflow-artifacts").rglob("*") if path.is_file()]
    return {name: sorted(values) for name, values in rows.items()} | {
        "files": sorted({path.name for path in artifacts})
    }
