"""The pages are served to this machine alone and nothing stays behind."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from modis_dist.integrations.mlflow import ui, ui_guard
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.lock import locked

MAIN = """import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
from modis_dist.integrations.mlflow.ui import serve
sys.exit(serve(Path(sys.argv[1]), port=0))"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A command that serves an empty database (MLflow makes the tables), and the address it prints."""
    (tmp_path / "mlflow.db").touch(mode=0o600)
    environment = dict(os.environ, PYTHONUNBUFFERED="1", COLUMNS="40")
    command = [sys.executable, "-c", MAIN, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("MLflow: http://127.0.0.1:"), (tmp_path / ui.LOG).read_text()
            yield process, line.split()[1]
        finally:
            process.kill()


def status(opener: urllib.request.OpenerDirector, url: str) -> int:
    try:
        with opener.open(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_it_answers_its_user_on_loopback_only_and_leaves_no_process_behind(
    ending: signal.Signals, served: tuple["subprocess.Popen[str]", str], tmp_path: Path
) -> None:
    process, address = served
    url, token = address.split("/?token=")
    stranger = urllib.request.build_opener()
    assert status(stranger, f"{url}/health") == 200
    for page in ("/", "/?token=guess", "/ajax-api/2.0/mlflow/experiments/search?max_results=1"):
        assert status(stranger, url + page) == 403
    user = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    assert status(user, address) == status(user, f"{url}/") == 200
    assert status(user, f"{url}/ajax-api/2.0/mlflow/experiments/search?max_results=1") == 200
    assert status(user, f"{url}/ajax-api/3.0/mlflow/assistant/config") == 404  # it would run commands for whoever asks
    assert token not in (tmp_path / ui.LOG).read_text()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 1
    assert not any(token in word for member in family for word in member.cmdline())
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    process.send_signal(ending)
    assert process.wait(20) == (0 if ending == signal.SIGINT else -ending)
    end = time.monotonic() + 10
    while (alive := [p for p in family if _lives(p)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive == []
    assert [p.name for p in tmp_path.iterdir() if p.stat().st_mode & 0o077] == []


def test_the_database_is_found_in_the_folder_above_it_or_where_the_summary_says(tmp_path: Path) -> None:
    study, elsewhere = tmp_path / "study", tmp_path / "elsewhere.db"
    trial = study / "trials" / "a"
    trial.mkdir(parents=True)
    with pytest.raises(DataError, match="no MLflow database"):
        ui.find(trial)
    (study / "summary.json").write_text(json.dumps({"mlflow": {"uri": f"sqlite:///{elsewhere}"}}))
    with pytest.raises(DataError, match="no MLflow database"):
        ui.find(study)
    elsewhere.touch()
    assert ui.find(study) == f"sqlite:///{elsewhere}"
    (study / "summary.json").write_text(json.dumps({"mlflow": {"uri": "http://tracking.example:5000"}}))
    assert ui.find(trial) == "http://tracking.example:5000"
    (study / "mlflow.db").touch()
    assert ui.find(trial) == ui.find(study) == f"sqlite:///{study}/mlflow.db"


def test_the_first_page_is_that_of_the_newest_experiment(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    assert ui.first_page(f"sqlite:///{path}") == "/#/experiments"
    with sqlite3.connect(path) as database:
        database.execute("create table experiments (experiment_id integer)")
        database.executemany("insert into experiments values (?)", [(0,), (1,), (12,)])
    database.close()
    assert ui.first_page(f"sqlite:///{path}") == "/#/experiments/12/runs?workflowType=machine_learning"


def test_runs_of_a_killed_study_are_shown_as_killed_and_those_of_a_living_one_as_running(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    folders = {name: tmp_path / name for name in ("dead", "living")}
    with closing(sqlite3.connect(path)) as database:
        database.execute("create table runs (run_uuid text, status text, end_time integer)")
        database.execute("create table tags (run_uuid text, key text, value text)")
        for name, folder in folders.items():
            folder.mkdir()
            database.executemany("insert into runs values (?, ?, null)", [(name, "RUNNING"), (f"{name}+", "FINISHED")])
            rows = [(name, "modis.folder", str(folder)), (f"{name}+", "modis.folder", str(folder))]
            database.executemany("insert into tags values (?, ?, ?)", rows)
        database.execute("insert into runs values ('foreign', 'RUNNING', null)")
        database.commit()
    gone = {"pid": 2**22 + 1, "host": socket.gethostname(), "started": 1.0}
    (folders["dead"] / "lock").write_text(json.dumps(gone))
    with locked(folders["living"]):
        ui.end_abandoned(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as database:
        found = dict(database.execute("select run_uuid, status from runs"))
    assert {name for name, status in found.items() if status == "RUNNING"} == {"living", "foreign"}
    assert {name for name, status in found.items() if status == "KILLED"} == {"dead"}
    ui.end_abandoned(f"sqlite:///{tmp_path}/none.db")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize(
    ("cookie", "wanted"), [("modis-ui-5=right", "200"), ("modis-ui-6=right", "403"), ("\x00;=", "403")]
)
def test_a_cookie_counts_for_its_port_alone(cookie: str, wanted: str) -> None:
    said: list[str] = []
    application = ui_guard.guarded(lambda _environ, start: start("200 OK", []) or [b""], token="right", page="/")
    environ = {"SERVER_PORT": "5", "PATH_INFO": "/", "QUERY_STRING": "", "HTTP_COOKIE": cookie}
    list(application(environ, lambda line, _headers: said.append(line[:3])))
    assert said == [wanted]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"mlflow": null}', '{"mlflow": {}}'])
def test_a_spoilt_summary_is_as_good_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(DataError, match="no MLflow database"):
        ui.find(tmp_path)


def test_a_missing_folder_is_a_data_error_with_exit_code_2(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder") as caught:
        ui.serve(tmp_path / "none", port=0)
    assert caught.value.exit_code == 2
