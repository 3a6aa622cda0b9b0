"""The mirror in a process of its own: what MLflow gets is the same, whatever becomes of that process."""

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from modis_dist.errors import ConfigError
from modis_dist.launch import mlflow_store
from modis_dist.launch.mlflow_apart import LOWEST, MirrorApart
from modis_dist.launch.mlflow_mirror import BackgroundMirror
from modis_dist.launch.mlflow_runs import Refused
from modis_dist.launch.mlflow_study import Mirror, NotUploaded
from modis_dist.train.journal import JournalWriter, read
from tests.launch.mlflow_tables import curves, expected
from tests.sweep.toy_study import COMMAND, write_store, write_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apart")
    mlflow_store.connect(mlflow_store.default_uri(path))
    return path


@pytest.fixture
def apart(folder: Path, request: pytest.FixtureRequest) -> Iterator[MirrorApart]:
    uri = mlflow_store.default_uri(folder)
    mirror = MirrorApart(uri=uri, experiment="apart", study=request.node.name.partition("[")[0], folder=folder)
    yield mirror
    mirror.close()


def child() -> psutil.Process:
    """The process that sends."""
    (found,) = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    return found


def journal(path: Path, *steps: int) -> list[dict[str, Any]]:
    writer = JournalWriter(path)
    for step in steps:
        writer.metrics("t1", step=step, values={"loss": step / 7, "balanced_accuracy": 1 / step})
    writer.close()
    return read(path)


def begin(mirror: MirrorApart | BackgroundMirror) -> None:
    mirror.start(params={"seed": 0}, tags={})
    mirror.trial("t1", name="first", params={"lr": 1e-3}, tags={"kind": "test"})


def test_it_sends_what_the_mirror_would_and_gives_way_to_every_training(
    apart: MirrorApart, folder: Path, tmp_path: Path
) -> None:
    records = journal(tmp_path / "j", 1, 2, 3)
    assert apart.describe()["parent_run_id"] == ""
    begin(apart)
    apart.feed(records)
    held = child()
    assert {os.getpriority(os.PRIO_PROCESS, thread.id) for thread in held.threads()} == {LOWEST}
    assert {os.sched_getscheduler(thread.id) for thread in held.threads()} == {os.SCHED_IDLE}
    assert os.sched_getscheduler(0) != os.SCHED_IDLE
    apart.end_trial("t1", status="FINISHED", metrics={"accuracy": 1.0}, artifacts=[])
    apart.finish(status="FINISHED", metrics={}, artifacts=[], model=None)
    parent = apart.describe()["parent_run_id"]
    apart.close()
    assert not held.is_running()
    (run,) = found(apart)
    assert curves(folder / mlflow_store.DATABASE, run.info.run_id) == expected(records)
    assert (run.info.status, run.data.params["lr"], run.data.tags["kind"]) == ("FINISHED", "0.001", "test")
    assert run.data.metrics["final/accuracy"] == 1.0 and run.data.tags["mlflow.parentRunId"] == parent


def found(mirror: MirrorApart) -> list[Any]:
    """Runs of its trials, by another client."""
    client = mlflow_store.connect(mirror.uri)
    experiment = mirror.describe()["experiment_id"]
    parent = mirror.describe()["parent_run_id"]
    return list(client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'"))


def test_where_it_is_killed_the_call_says_so_and_the_next_finds_what_was_sent(
    apart: MirrorApart, folder: Path, tmp_path: Path
) -> None:
    records = journal(tmp_path / "j", *range(1, 9))
    begin(apart)
    apart.feed(records[:4])
    first = child()
    first.suspend()
    first.kill()
    with pytest.raises(Refused, match="its process has died; was it killed") as raised:
        apart.feed(records[4:])
    assert not raised.value.permanent
    apart.feed(records[4:])
    assert child() != first
    apart.end_trial("t1", status="FINISHED", metrics={}, artifacts=[])
    (run,) = found(apart)
    assert curves(folder / mlflow_store.DATABASE, run.info.run_id) == expected(records)


def test_in_the_background_a_killed_one_is_replaced_and_nobody_waits(
    apart: MirrorApart, folder: Path, tmp_path: Path
) -> None:
    records = journal(tmp_path / "j", *range(1, 41))
    mirror = BackgroundMirror(apart)
    begin(mirror)
    end = time.monotonic() + 60
    while not mirror.describe()["parent_run_id"] and time.monotonic() < end:
        time.sleep(0.02)
    child().kill()
    for record in records:
        mirror.feed([record])
    mirror.end_trial("t1", status="FINISHED", metrics={}, artifacts=[])
    (problem,) = mirror.close(60)
    assert "its process has died" in problem
    (run,) = found(apart)
    assert (
        curves(folder / mlflow_store.DATABASE, run.info.run_id) == expected(records) and run.info.status == "FINISHED"
    )


def test_signals_to_the_whole_job_are_left_to_the_driver(apart: MirrorApart) -> None:
    apart.start(params={}, tags={})
    held = child()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        held.send_signal(number)
    apart.finish(status="KILLED", metrics={}, artifacts=[], model=None)
    assert child() == held


def test_it_ends_with_a_study_that_is_killed_whose_next_start_ends_and_completes_its_runs(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), folds=1)
    out = tmp_path / "out"
    command = [*COMMAND, "tune", str(study), "--out", str(out), "--set", "optim.epochs=200"]
    with (tmp_path / "said.txt").open("w") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            end = time.monotonic() + 120
            while not states(out) and time.monotonic() < end:
                time.sleep(0.02)
            family = psutil.Process(driver.pid).children(recursive=True)
        finally:
            driver.kill()
            driver.wait()
    assert set(states(out)) <= {"RUNNING", "FINISHED"} and family
    assert not psutil.wait_procs(family, timeout=10)[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "MLflow" not in done.stderr
    assert states(out) == ["FINISHED"] * 4  # the study, two trials, a refit
    journal = [record for path in out.glob("packs/*/journal.jsonl") for record in read(path)]
    with closing(sqlite3.connect(f"file:{out}/mlflow.db?mode=ro", uri=True)) as held:
        (points,) = held.execute("select count(*) from metrics where key not like 'final/%' and step > 0").fetchone()
    assert points == sum(len(record["values"]) for record in journal if record["kind"] == "metrics") > 0


def states(out: Path) -> list[str]:
    """Of every run that a study has in its database."""
    if not (out / "mlflow.db").exists():
        return []
    with closing(sqlite3.connect(f"file:{out}/mlflow.db?mode=ro", uri=True)) as held:
        return [status for (status,) in held.execute("select status from runs")]


def test_what_mlflow_refuses_is_told_as_the_mirror_tells_it(apart: MirrorApart, tmp_path: Path, folder: Path) -> None:
    begin(apart)
    with pytest.raises(Refused) as raised:
        apart.feed([{"kind": "metrics", "trial": "t1", "time_ms": -5, "step": 0, "values": {"a": 1.0}}])
    assert raised.value.permanent
    with pytest.raises(NotUploaded, match=r"gone\.csv"):
        apart.end_trial("t1", status="FINISHED", metrics={}, artifacts=[tmp_path / "gone.csv"])
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    for mirror in (MirrorApart, Mirror):
        made = mirror(uri=mlflow_store.default_uri(tmp_path), experiment="e", study="s", folder=folder)
        with pytest.raises((Refused, ConfigError), match="is not a SQLite database"):
            made.start(params={}, tags={})
        made.close()


def test_an_address_that_cannot_be_used_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown kind of address"):
        MirrorApart(uri="ftp://x", experiment="e", study="s", folder=tmp_path)


def test_a_call_that_hangs_is_ended_when_the_study_is_over(apart: MirrorApart) -> None:
    mirror = BackgroundMirror(apart)
    mirror.start(params={}, tags={})
    while not mirror.describe()["parent_run_id"]:
        time.sleep(0.02)
    held = child()
    held.suspend()
    mirror.feed([{"kind": "metrics", "trial": "t1", "time_ms": 5, "step": 1, "values": {"a": 1.0}}])
    began = time.monotonic()
    (left,) = mirror.close(0.5)
    assert "1 updates not delivered" in left and time.monotonic() - began < 5
    assert not held.is_running()
