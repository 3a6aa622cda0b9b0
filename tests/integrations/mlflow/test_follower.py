"""The process that follows a run folder: priority, signals, exit."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from modis_dist.cli.main import run as command
from modis_dist.integrations.mlflow import follower as mlflow_follower
from modis_dist.integrations.mlflow.follower import LOWEST, Follower, follow
from modis_dist.integrations.mlflow.sync import read_state, was_delivered
from modis_dist.runtime.errors import ConfigError, RunFailed
from modis_dist.train.journal import read
from tests.integrations.mlflow.mlflow_tables import curves, parent_and_trials, query, runs
from tests.integrations.mlflow.replay import Replay, driver
from tests.study.toy_study import COMMAND, write_store, write_study

PATIENCE_S = 240.0  # for a process that runs on idle cores only


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def follower_of(folder: Path) -> psutil.Process:
    """Return the process that follows a folder."""
    words = ["mlflow-sync", str(folder), "--follow"]
    (process,) = [p for p in psutil.process_iter() if p.is_running() and cmdline(p)[-3:] == words]
    return process


def cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def has_curves(replay: Replay) -> bool:
    return any(curves(replay.database, run.id) for run in runs(replay.database))


# --- life cycle --------------------------------------------------------------------------------------------------


def test_the_follower_runs_at_idle_priority_ignores_signals_of_the_job_and_completes_mlflow(
    replay: Replay,
) -> None:
    follower = Follower(replay.folder)
    with driver(replay.folder):
        replay.epochs(2)
        follower.start()
        until(lambda: has_curves(replay))
        process = follower_of(replay.folder)
        assert process.nice() == LOWEST and os.getsid(process.pid) == process.pid
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE != os.sched_getscheduler(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            process.send_signal(number)
        replay.finish()
        (left,) = follower.wait(0)
        assert str(process.pid) in left and "mlflow-sync" in left
    assert follower.wait(PATIENCE_S) == [] and not process.is_running()
    assert was_delivered(replay.folder, replay.uri)
    replay.assert_complete()


def test_the_follower_of_a_killed_driver_closes_runs_as_killed_and_ends(replay: Replay) -> None:
    follower = Follower(replay.folder)
    with driver(replay.folder) as process:
        replay.epochs(3)
        replay.results(replay.search[:1])
        follower.start()
        until(lambda: has_curves(replay))
        process.kill()
        process.wait()
        assert follower.wait(PATIENCE_S) == []
    parent, trials = parent_and_trials(replay.database)
    assert [run.status for run in (parent, *(trials[name] for name in replay.search))] == [
        "KILLED", "FINISHED", "KILLED"
    ]  # fmt: skip
    replay.assert_complete()


@pytest.mark.slow
def test_the_follower_can_be_stopped_once_the_study_has_ended(replay: Replay) -> None:
    write_study(replay.folder / "study.yaml", replay.folder, mlflow={"tracking_uri": "http://127.0.0.1:9"})
    follower = Follower(replay.folder)
    with driver(replay.folder):
        follower.start()
        until(lambda: read_state(replay.folder)["problems"])
        process = follower_of(replay.folder)
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.is_running(), "the signal was meant for the driver"
    until(lambda: not blocks(process, signal.SIGTERM))
    process.send_signal(signal.SIGTERM)
    assert "127.0.0.1:9" in follower.wait(PATIENCE_S)[0] and not process.is_running()


def blocks(process: psutil.Process, number: signal.Signals) -> bool:
    """Return True if the process blocks a signal."""
    (mask,) = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigBlk" in line]
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep ``follow`` from changing the priority of the test process."""
    for name in ("_lower_priority", "_use_idle_cores"):
        monkeypatch.setattr(mlflow_follower, name, lambda: None)
    monkeypatch.setattr(mlflow_follower, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.mark.usefixtures("in_this_process")
def test_after_the_study_the_follower_times_out_and_names_the_server_without_its_password(
    replay: Replay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_follower, "GIVE_UP_S", 0.1)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        uri = f"http://user:SECRET@127.0.0.1:{sock.getsockname()[1]}"
    with pytest.raises(RunFailed) as raised:
        follow(replay.folder, uri)
    (problem,) = read_state(replay.folder)["problems"]
    assert problem in str(raised.value) and "127.0.0.1" in problem
    assert not any("SECRET" in text for text in (problem, str(raised.value)))


@pytest.mark.usefixtures("in_this_process")
def test_after_the_study_the_follower_ends_at_once_if_a_retry_cannot_help(replay: Replay) -> None:
    replay.database.write_bytes(b"no database" * 100)
    with pytest.raises(RunFailed, match=r"mlflow\.db"):
        follow(replay.folder)


def test_the_follower_works_if_priorities_cannot_be_changed(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", forbidden)
    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    replay.epochs(2)
    assert follow(replay.folder).trials == 2


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command_completes_a_study_and_reports_it_as_text_and_json(
    replay: Replay, capsys: pytest.CaptureFixture[str]
) -> None:
    import json

    replay.finish()
    assert command(["mlflow-sync", str(replay.folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["trials"], result["complete"], result["uri"]) == (3, True, replay.uri)
    assert command(["mlflow-sync", str(replay.folder)]) == 0
    assert replay.uri in capsys.readouterr().out


def test_the_command_fails_without_a_server_or_a_study(
    replay: Replay, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert command(["mlflow-sync", str(replay.folder), "--uri", "http://127.0.0.1:9"]) == 3
    assert "127.0.0.1" in capsys.readouterr().err
    assert command(["mlflow-sync", str(replay.folder), "--uri", "ftp://nowhere"]) == 2
    assert command(["mlflow-sync", str(tmp_path)]) == 2


# --- with `tune` ------------------------------------------------------------------------------------------------


def test_an_invalid_tracking_uri_is_refused_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), mlflow={"tracking_uri": "ftp://x"})
    assert command(["tune", str(study), "--out", str(tmp_path / "out")]) == ConfigError.exit_code
    assert "sweep.mlflow.tracking_uri" in capsys.readouterr().err and not list(tmp_path.glob("out/trials/*"))


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """The output folder of a tracked study whose driver was killed in the middle."""
    settings = {"folds": 1, "probe": False, "mlflow": {}}
    study = write_study(tmp_path / "study.yaml", write_store(tmp_path / "store"), **settings)
    out = tmp_path / "out"
    words = [*COMMAND, "tune", str(study), "--out", str(out), "--set", "optim.epochs=120"]
    with (tmp_path / "stderr.txt").open("w") as log, subprocess.Popen(words, stdout=log, stderr=log) as process:
        until(lambda: process.poll() is not None or "RUNNING" in statuses(out))
        assert process.poll() is None, "the study ended before it was killed"
        process.kill()
    yield out


def statuses(out: Path) -> list[str]:
    return [run.status for run in runs(out / "mlflow.db")] if (out / "mlflow.db").exists() else []


@pytest.mark.slow
def test_a_killed_study_has_status_killed_and_its_next_start_completes_it(killed: Path) -> None:
    until(lambda: set(statuses(killed)) <= {"KILLED", "FINISHED"})
    arguments = ["tune", str(killed.parent / "study.yaml"), "--out", str(killed), "--set", "optim.epochs=120"]
    assert command(arguments) == 0
    until(lambda: read_state(killed)["delivered"])
    assert statuses(killed) == ["FINISHED"] * 4  # the study, two trials, a refit
    records = [record for path in killed.glob("packs/*/journal.jsonl") for record in read(path)]
    text = "select count(*) from metrics where key not like 'final/%' and step > 0"
    ((points,),) = query(killed / "mlflow.db", text)
    assert points == sum(len(record["values"]) for record in records if record["kind"] == "metrics") > 0
