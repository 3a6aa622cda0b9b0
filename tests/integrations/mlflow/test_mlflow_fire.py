"""Whole studies while MLflow is down, hangs, fails, is slow, locked or read-only, and what it has after the next start.

Real processes, a real MLflow server behind a gate, real SQLite files.
"""

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.runtime.lock import locked
from modis_dist.train.journal import read
from tests.integrations.mlflow.fire import READ_ONLY, Fault, Gate, mlflow_server, study_process
from tests.integrations.mlflow.mlflow_tables import curves, expected
from tests.study.toy_study import write_store, write_study

LIMIT_S = 240.0


@dataclass(frozen=True)
class SharedStudy:
    """What all studies here share."""

    study: Path
    gate: Gate
    database: Path  # of the server


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedStudy]:
    folder = tmp_path_factory.mktemp("fire")
    study = write_study(folder / "study.yaml", write_store(folder / "store"), probe=False, folds=1)
    mlflow_store.connect(f"sqlite:///{folder}/mlflow.db")
    shutil.copy(folder / "mlflow.db", folder / "new.db")
    with mlflow_server(folder) as port:
        gate = Gate(port)
        yield SharedStudy(study, gate, folder / "mlflow.db")
        gate.close()


@pytest.fixture(scope="module")
def calm(place: SharedStudy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The summary of the study that nothing happened to."""
    place.gate.be("open")
    out = tmp_path_factory.mktemp("calm") / "out"
    assert finish(begin(place, out, TEST_PATIENCE_S="60")) == 0
    complete(out, place.database, experiment=out.parent.name)
    return summary_of(out)


def begin(place: SharedStudy, out: Path, *options: str, uri: str | None = None, **environment: str) -> Any:
    arguments = [
        "tune",
        str(place.study),
        "--out",
        str(out),
        "--set",
        f"sweep.mlflow.experiment_name={out.parent.name}",
    ]
    arguments += ["--set", f"sweep.mlflow.tracking_uri={uri or place.gate.uri}", *options]
    quick = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    process = study_process(arguments, out.parent / "stderr.txt", quick | environment)
    process.start()
    return process


def finish(process: Any) -> int | None:
    process.join(LIMIT_S)
    process.kill()
    return process.exitcode


def summary_of(out: Path) -> dict[str, Any]:
    summary = json.loads((out / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in {"seconds", "mlflow"}}


def runs(database: Path, experiment: str) -> list[dict[str, Any]]:
    """Every run of an experiment with its tags, read from MLflow's tables by hand."""
    query = "select run_uuid, status from runs join experiments using (experiment_id) where experiments.name = ?"
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as held:
        found = held.execute(query, [experiment]).fetchall()
        tags = {run: dict(held.execute("select key, value from tags where run_uuid = ?", [run])) for run, _ in found}
    return [{"id": run, "status": status, "tags": tags[run]} for run, status in found]


def complete(out: Path, database: Path, *, experiment: str) -> None:
    """MLflow holds every metric of every epoch of the journals once and nothing else, below one finished parent."""
    found = runs(database, experiment)
    (parent,) = [run for run in found if "modis.trial_id" not in run["tags"]]
    children = {run["tags"]["modis.trial_id"]: run for run in found if run is not parent}
    assert len(children) == len(found) - 1
    journal = [record for path in out.glob("packs/*/journal.jsonl") for record in read(path)]
    assert set(children) == {record["trial"] for record in journal} and len(children) == 3  # two trials, one refit
    for trial, run in children.items():
        metrics = [r for r in journal if r["trial"] == trial and r["kind"] == "metrics"]
        wanted = expected(metrics)
        assert {step for _, step, _, _ in wanted} == set(range(1, max(r["step"] for r in metrics) + 1))
        assert curves(database, run["id"]) == wanted
        assert run["tags"]["mlflow.parentRunId"] == parent["id"]
    assert {run["status"] for run in found} == {"FINISHED"}


def wait_for(condition: Callable[[], object], process: Any) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert process.is_alive() and time.monotonic() < end
        time.sleep(0.02)


# --- a server -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["refuse", "500", "hang", "slow"])
def test_a_study_ends_the_same_without_its_server_and_the_next_start_sends_everything(
    fault: Fault, place: SharedStudy, calm: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    place.gate.be(fault)
    assert finish(begin(place, out)) == 0, (tmp_path / "stderr.txt").read_text()  # the fault lasts beyond its end
    assert summary_of(out) == calm
    assert "updates not delivered; the same command sends them" in (tmp_path / "stderr.txt").read_text()
    place.gate.be("open")
    assert finish(begin(place, out, TEST_PATIENCE_S="60")) == 0
    assert summary_of(out) == calm and "MLflow" not in (tmp_path / "stderr.txt").read_text()
    complete(out, place.database, experiment=tmp_path.name)


@pytest.mark.parametrize("killed", [False, True])
def test_a_server_or_a_study_that_dies_midway_leaves_no_gap_no_duplicate_and_no_running_run(
    killed: bool, place: SharedStudy, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    place.gate.be("open")
    process = begin(place, out, "--set", "optim.epochs=40")

    def some_metrics() -> bool:
        return any(curves(place.database, run["id"]) for run in runs(place.database, tmp_path.name))

    wait_for(some_metrics, process)
    if killed:
        process.kill()
        assert finish(process) == -9
        end = time.monotonic() + 30  # the process that writes to MLflow has that long to say so
        while (states := {run["status"] for run in runs(place.database, tmp_path.name)}) != {"KILLED"}:
            assert time.monotonic() < end, states
            time.sleep(0.1)
        with locked(out):  # forked, that process has the study's lock until it ends
            pass
    else:
        place.gate.be("refuse")
        assert finish(process) == 0
        place.gate.be("open")
    again = begin(place, out, "--set", "optim.epochs=40", TEST_PATIENCE_S="60")
    assert finish(again) == 0, (tmp_path / "stderr.txt").read_text()
    complete(out, place.database, experiment=tmp_path.name)


# --- a file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["locked", "read-only"])
def test_a_study_ends_the_same_with_a_database_it_cannot_write_and_the_next_start_fills_it(
    fault: str, place: SharedStudy, calm: dict[str, Any], tmp_path: Path
) -> None:
    out, database = tmp_path / "out", tmp_path / "own.db"
    shutil.copy(place.database.with_name("new.db"), database)
    uri = f"sqlite:///{database}"
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        if fault == "locked":
            other.execute("BEGIN EXCLUSIVE")
            first = begin(place, out, uri=uri)
        elif os.geteuid() == 0:
            first = begin(place, out, uri=uri, **{READ_ONLY: str(database)})
        else:
            pytest.skip("only root may mount a file read-only")
        assert finish(first) == 0, (tmp_path / "stderr.txt").read_text()
    assert summary_of(out) == calm
    assert "updates not delivered" in (tmp_path / "stderr.txt").read_text()
    assert runs(database, tmp_path.name) == []
    assert finish(begin(place, out, uri=uri, TEST_PATIENCE_S="60")) == 0
    complete(out, database, experiment=tmp_path.name)
