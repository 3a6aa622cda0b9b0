"""The mirror in a process of its own: what MLflow gets is the same, whatever becomes of that process."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from modis_dist.cli.main import run as modis_dist
from modis_dist.integrations.mlflow import apart as mlflow_apart
from modis_dist.integrations.mlflow import mirror as mlflow_mirror
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow.apart import LOWEST, MirrorApart
from modis_dist.integrations.mlflow.mirror import BackgroundMirror
from modis_dist.integrations.mlflow.runs import Refused
from modis_dist.integrations.mlflow.study import DELIVERED, Mirror, NotUploaded
from modis_dist.runtime.errors import ConfigError
from modis_dist.train.journal import JournalWriter, read
from tests.integrations.mlflow.mlflow_tables import curves, expected
from tests.study.toy_study import COMMAND, write_store, write_study

PATIENCE_S = 240.0  # of a process that only gets cores that nobody wants


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("apart")
    mlflow_store.connect(mlflow_store.default_uri(path))
    return path


@pytest.fixture
def apart(folder: Path, request: pytest.FixtureRequest) -> Iterator[MirrorApart]:
    mirror = MirrorApart(
        uri=mlflow_store.default_uri(folder), experiment="apart", study=request.node.name, folder=folder
    )
    yield mirror
    mirror.close()


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process comes from this one, with what is loaded and changed here."""
    monkeypatch.setattr(mlflow_apart, "get_context", lambda _: multiprocessing.get_context("fork"))


def child(mirror: MirrorApart) -> psutil.Process:
    """The process that sends."""
    assert mirror._process is not None
    return psutil.Process(mirror._process.pid)


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def journal(path: Path, *steps: int) -> list[dict[str, Any]]:
    writer = JournalWriter(path)
    for step in steps:
        writer.metrics("t1", step=step, values={"loss": step / 7, "balanced_accuracy": 1 / step})
    writer.close()
    return read(path)


def begin(mirror: MirrorApart | BackgroundMirror) -> None:
    mirror.start(params={"seed": 0}, tags={})
    mirror.trial("t1", name="first", params={"lr": 1e-3}, tags={"kind": "test"})


def run_of(mirror: MirrorApart) -> Any:
    """The run of its only trial, by another client."""
    client, told = mlflow_store.connect(mirror.uri), mirror.describe()
    (run,) = client.search_runs([told["experiment_id"]], f"tags.`mlflow.parentRunId` = '{told['parent_run_id']}'")
    return run


# --- what is sent -----------------------------------------------------------------------------------------------


def test_it_sends_what_the_mirror_would_and_gives_way_to_every_training(
    apart: MirrorApart, folder: Path, tmp_path: Path
) -> None:
    records = journal(tmp_path / "j", 1, 2, 3)
    assert apart.describe()["parent_run_id"] == ""
    begin(apart)
    apart.feed(records)
    held = child(apart)
    trainers = {os.sched_getscheduler(thread.id) for thread in psutil.Process().threads()}
    assert os.getpriority(os.PRIO_PROCESS, held.pid) == LOWEST
    assert os.sched_getscheduler(held.pid) == os.SCHED_IDLE and os.SCHED_IDLE not in trainers
    apart.end_trial("t1", status="FINISHED", metrics={"accuracy": 1.0}, artifacts=[])
    apart.finish(status="FINISHED", metrics={}, artifacts=[], model=None)
    parent = apart.describe()["parent_run_id"]
    apart.close()
    assert not held.is_running()
    run = run_of(apart)
    assert curves(folder / mlflow_store.DATABASE, run.info.run_id) == expected(records)
    assert (run.info.status, run.data.params["lr"], run.data.tags["kind"]) == ("FINISHED", "0.001", "test")
    assert run.data.metrics["final/accuracy"] == 1.0 and run.data.tags["mlflow.parentRunId"] == parent
    assert DELIVERED in run.data.tags


@pytest.mark.usefixtures("forked")
def test_what_mlflow_refuses_is_told_as_the_mirror_tells_it(apart: MirrorApart, tmp_path: Path) -> None:
    begin(apart)
    with pytest.raises(Refused) as raised:
        apart.feed([{"kind": "metrics", "trial": "t1", "time_ms": -5, "step": 0, "values": {"a": 1.0}}])
    assert raised.value.permanent
    with pytest.raises(NotUploaded, match=r"gone\.csv"):
        apart.end_trial("t1", status="FINISHED", metrics={}, artifacts=[tmp_path / "gone.csv"])
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 100)
    for kind in (MirrorApart, Mirror):
        made = kind(uri=mlflow_store.default_uri(tmp_path), experiment="e", study="s", folder=tmp_path)
        with pytest.raises((Refused, ConfigError), match="is not a SQLite database"):
            made.start(params={}, tags={})
        made.close()


def test_an_address_that_cannot_be_used_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown kind of address"):
        MirrorApart(uri="ftp://x", experiment="e", study="s", folder=tmp_path)


@pytest.mark.usefixtures("forked")
def test_it_works_where_priorities_may_not_be_changed(apart: MirrorApart, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", forbidden)
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    apart.start(params={}, tags={})
    assert apart.describe()["parent_run_id"]


@pytest.mark.usefixtures("forked")
def test_records_lost_on_this_side_while_it_is_busy_keep_a_trial_from_counting_as_delivered(
    apart: MirrorApart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_mirror, "MAX_PENDING", 4)
    records, mirror = journal(tmp_path / "j", *range(1, 11)), BackgroundMirror(apart)
    begin(mirror)
    until(lambda: mirror.describe()["parent_run_id"])
    child(apart).suspend()
    for record in records:
        mirror.feed([record])
    child(apart).resume()
    mirror.end_trial("t1", status="FINISHED", metrics={}, artifacts=[])
    assert "not everything was taken; the same command tries the rest again" in mirror.close(PATIENCE_S)
    run = run_of(apart)
    assert run.info.status == "FINISHED" and DELIVERED not in run.data.tags


# --- its end ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked")
def test_where_it_is_killed_the_call_says_so_and_the_next_finds_what_was_sent(
    apart: MirrorApart, folder: Path, tmp_path: Path
) -> None:
    records = journal(tmp_path / "j", *range(1, 9))
    begin(apart)
    apart.feed(records[:4])
    first = child(apart)
    threading.Timer(0.5, first.kill).start()  # while it is asked
    first.suspend()
    with pytest.raises(Refused, match="the process that writes to MLflow has died") as raised:
        apart.feed(records[4:])
    assert not raised.value.permanent
    apart.feed(records[4:])
    apart.end_trial("t1", status="FINISHED", metrics={}, artifacts=[])
    assert child(apart) != first
    assert curves(folder / mlflow_store.DATABASE, run_of(apart).info.run_id) == expected(records)


@pytest.mark.usefixtures("forked")
def test_another_that_cannot_begin_at_once_begins_anew(
    apart: MirrorApart, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, told, down = journal(tmp_path / "j", *range(1, 9)), apart._told, [True]
    begin(apart)
    apart.feed(records[:4])
    first = child(apart)

    def sometimes(call: Any) -> None:
        if down.pop() if down else False:
            raise Refused("connection refused")
        told(call)

    monkeypatch.setattr(apart, "_told", sometimes)
    first.kill()
    until(lambda: apart._process is not None and not apart._process.is_alive())
    with pytest.raises(Refused, match="connection refused"):
        apart.feed(records[4:])
    apart.feed(records[4:])
    apart.end_trial("t1", status="FINISHED", metrics={}, artifacts=[])
    assert child(apart) != first
    assert curves(folder / mlflow_store.DATABASE, run_of(apart).info.run_id) == expected(records)


@pytest.mark.usefixtures("forked")
def test_in_the_background_a_killed_one_is_replaced(apart: MirrorApart, folder: Path, tmp_path: Path) -> None:
    records = journal(tmp_path / "j", *range(1, 41))
    mirror = BackgroundMirror(apart)
    begin(mirror)
    until(lambda: mirror.describe()["parent_run_id"])
    held = child(apart)
    held.suspend()
    for record in records:
        mirror.feed([record])
    time.sleep(0.2)  # it is being asked
    held.kill()
    mirror.end_trial("t1", status="FINISHED", metrics={}, artifacts=[])
    (problem,) = mirror.close(PATIENCE_S)
    assert "was it killed" in problem
    run = run_of(apart)
    assert curves(folder / mlflow_store.DATABASE, run.info.run_id) == expected(records)
    assert run.info.status == "FINISHED"


def test_signals_to_the_whole_job_are_left_to_the_driver(apart: MirrorApart) -> None:
    apart.start(params={}, tags={})
    held = child(apart)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        held.send_signal(number)
    apart.finish(status="KILLED", metrics={}, artifacts=[], model=None)
    assert child(apart) == held


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("impatient", [False, True])
def test_a_call_that_hangs_is_ended_when_the_study_is_over_or_its_user_does_not_wait(
    impatient: bool, apart: MirrorApart, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = BackgroundMirror(apart)
    mirror.start(params={}, tags={})
    until(lambda: mirror.describe()["parent_run_id"])
    held = child(apart)
    held.suspend()
    mirror.feed([{"kind": "metrics", "trial": "t1", "time_ms": 5, "step": 1, "values": {"a": 1.0}}])
    if impatient:

        def interrupted(_: float) -> NoReturn:
            raise KeyboardInterrupt

        monkeypatch.setattr(mirror._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mirror.close(60)
    else:
        (left,) = mirror.close(0.5)
        assert left == "1 updates not delivered; the same command sends them"
    assert not held.is_running()


def test_a_program_that_ends_without_a_word_does_not_wait_for_it(folder: Path) -> None:
    text = f"""if __name__ == "__main__":
    from pathlib import Path
    from modis_dist.integrations.mlflow.apart import MirrorApart
    uri = {mlflow_store.default_uri(folder)!r}
    mirror = MirrorApart(uri=uri, experiment="e", study="s", folder=Path({str(folder)!r}))
    mirror.start(params={{}}, tags={{}})
    print(mirror._process.pid)"""
    program = folder / "program.py"
    program.write_text(text)
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert done.stderr == "" and not psutil.pid_exists(int(done.stdout))


@pytest.mark.exhaustive
def test_a_study_that_is_killed_counts_as_killed_and_its_next_start_completes_it(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), folds=1)
    out = tmp_path / "out"
    command = [*COMMAND, "tune", str(study), "--out", str(out), "--set", "optim.epochs=120"]
    with (tmp_path / "said.txt").open("w") as said:
        driver = subprocess.Popen(command, stdout=said, stderr=said)
        try:
            until(lambda: "RUNNING" in states(out) or driver.poll() is not None)
            family = psutil.Process(driver.pid).children(recursive=True)
            assert driver.poll() is None
        finally:
            driver.kill()
            driver.wait()
    assert not psutil.wait_procs(family, timeout=mlflow_apart.FAREWELL_S + 15)[1]
    assert set(states(out)) <= {"KILLED", "FINISHED"}
    assert modis_dist(command[len(COMMAND) :]) == 0  # in this process, where MLflow waits for no idle core
    assert states(out) == ["FINISHED"] * 4  # the study, two trials, a refit
    records = [record for path in out.glob("packs/*/journal.jsonl") for record in read(path)]
    with closing(sqlite3.connect(f"file:{out}/mlflow.db?mode=ro", uri=True)) as held:
        (points,) = held.execute("select count(*) from metrics where key not like 'final/%' and step > 0").fetchone()
    assert points == sum(len(record["values"]) for record in records if record["kind"] == "metrics") > 0


def states(out: Path) -> list[str]:
    """Of every run that a study has in its database."""
    if not (out / "mlflow.db").exists():
        return []
    with closing(sqlite3.connect(f"file:{out}/mlflow.db?mode=ro", uri=True)) as held:
        return [status for (status,) in held.execute("select status from runs")]
