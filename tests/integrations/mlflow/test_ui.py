"""The UI is served on this machine only, and no process or public file is left."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from modis_dist.integrations.mlflow import ui, ui_guard
from modis_dist.integrations.mlflow.store import only_writer
from modis_dist.runtime.errors import DataError
from tests.integrations.mlflow.mlflow_tables import runs
from tests.integrations.mlflow.replay import Replay
from tests.study.toy_study import write_study

MAIN = """import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
from modis_dist.integrations.mlflow.ui import serve
sys.exit(serve(Path(sys.argv[1]), port=0))"""


@pytest.fixture
def served(replay: Replay) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A process that serves a study that MLflow does not have yet, and the address it prints."""
    replay.database.unlink()
    replay.epochs(2)
    environment = dict(os.environ, PYTHONUNBUFFERED="1", COLUMNS="40")
    command = [sys.executable, "-c", MAIN, str(replay.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=replay.folder) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("MLflow: http://127.0.0.1:"), (replay.folder / ui.LOG).read_text()
            yield process, line.split()[1]
        finally:
            process.kill()


def status(opener: urllib.request.OpenerDirector, url: str) -> int:
    try:
        with opener.open(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_the_ui_listens_on_loopback_only_and_leaves_no_process(
    ending: signal.Signals, served: tuple["subprocess.Popen[str]", str], replay: Replay
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
    assert status(user, f"{url}/ajax-api/3.0/mlflow/assistant/config") == 404  # it would run commands for any client
    assert token not in (replay.folder / ui.LOG).read_text()
    replay.assert_complete()
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 1
    assert not any(token in word for member in family for word in member.cmdline())
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    process.send_signal(ending)
    assert process.wait(20) == (0 if ending == signal.SIGINT else -ending)
    end = time.monotonic() + 10
    while (alive := [p for p in family if _is_running(p)]) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive == []
    names = [p.name for p in replay.folder.iterdir() if "mlflow" in p.name and p.stat().st_mode & 0o077]
    assert names == []


def test_the_study_of_a_subfolder_is_found_with_its_database_in_the_folder_or_at_its_tracking_uri(
    tmp_path: Path,
) -> None:
    study = tmp_path / "study"
    trial = study / "trials" / "a"
    trial.mkdir(parents=True)
    with pytest.raises(DataError, match=str(trial)):
        ui.find(trial)
    (study / "manifest.json").touch()
    write_study(study / "study.yaml", tmp_path, mlflow={"tracking_uri": "http://tracking.example:5000"})
    assert ui.find(trial) == (study, "http://tracking.example:5000")
    write_study(study / "study.yaml", tmp_path)
    assert ui.find(trial) == (study, f"sqlite:///{study}/mlflow.db")
    write_study(study / "study.yaml", tmp_path, mlflow={"tracking_uri": "http://tracking.example:5000"})
    (study / "mlflow.db").touch()
    assert ui.find(trial) == ui.find(study) == (study, f"sqlite:///{study}/mlflow.db")


def test_for_a_server_that_is_down_its_address_and_a_note_are_printed(
    replay: Replay, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    replay.database.unlink()
    write_study(replay.folder / "study.yaml", replay.folder, mlflow={"tracking_uri": "http://127.0.0.1:9"})
    assert ui.serve(replay.folder, port=0) == 0
    output = capsys.readouterr()
    assert "http://127.0.0.1:9" in output.out and "127.0.0.1" in output.err


def test_the_first_page_is_that_of_the_newest_experiment(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    assert ui.first_page(f"sqlite:///{path}") == "/#/experiments"
    with sqlite3.connect(path) as database:
        database.execute("create table experiments (experiment_id integer)")
        database.executemany("insert into experiments values (?)", [(0,), (1,), (12,)])
    database.close()
    assert ui.first_page(f"sqlite:///{path}") == "/#/experiments/12/runs?workflowType=machine_learning"


def test_the_ui_is_served_while_a_follower_runs(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def no_server(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(ui, "_server", no_server)
    with only_writer(replay.folder), pytest.raises(KeyboardInterrupt):
        ui.serve(replay.folder, port=0)
    assert runs(replay.database) == []


@pytest.mark.parametrize(
    ("cookie", "forwarded"), [("modis-ui-5=right", "200"), ("modis-ui-6=right", "403"), ("\x00;=", "403")]
)
def test_a_cookie_is_valid_only_for_its_port(cookie: str, forwarded: str) -> None:
    cookies: list[str] = []
    application = ui_guard.guarded(lambda _environ, start: start("200 OK", []) or [b""], token="right", page="/")
    environ = {"SERVER_PORT": "5", "PATH_INFO": "/", "QUERY_STRING": "", "HTTP_COOKIE": cookie}
    list(application(environ, lambda line, _headers: cookies.append(line[:3])))
    assert cookies == [forwarded]


def test_a_missing_folder_is_a_data_error_with_exit_code_2(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path / "none")) as caught:
        ui.serve(tmp_path / "none", port=0)
    assert caught.value.exit_code == 2
