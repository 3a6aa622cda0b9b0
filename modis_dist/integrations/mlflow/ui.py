"""Opens the MLflow pages of a finished or running study, on this machine alone and for its user alone."""

import json
import os
import secrets
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType

from rich.console import Console

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import ui_guard
from modis_dist.integrations.mlflow.runs import FOLDER
from modis_dist.runtime.errors import DataError, RunFailed
from modis_dist.runtime.lock import holder
from modis_dist.runtime.text import shown

HOST = "127.0.0.1"
START_S = 120.0
STOP_S = 10.0
LEVELS = 3  # a trial's folder lies this deep in its study's
LOG = "mlflow-ui.log"


def serve(folder: Path, *, port: int) -> int:
    """Show the study of a folder until Ctrl-C; port 0 takes a free one. Returns the exit code.

    Raises ``DataError`` where nothing was tracked and ``RunFailed`` where the server does not start.
    """
    uri = find(folder)
    console = Console(highlight=False)
    if mlflow_store.sqlite_path(uri) is None:
        console.print(f"This study is tracked on a server: {uri}", markup=False, soft_wrap=True)
        return 0
    end_abandoned(uri)
    log, token = folder / LOG, secrets.token_urlsafe(24)
    with _sigterm_as_interrupt(), _server(uri, port or _free_port(), log, token) as (server, url):
        try:
            with console.status("starting MLflow"):
                _wait(server, url, log)
            console.print(f"MLflow: {url}/?token={token}   (Ctrl-C to stop)", markup=False, soft_wrap=True)
            return server.wait()
        except KeyboardInterrupt:
            return 0


def find(folder: Path) -> str:
    """Address where the study of a folder is tracked: its own database, its summary's, or that of a folder above."""
    if not folder.is_dir():
        raise DataError(f"{shown(str(folder))}: no such folder")
    for here in [folder.resolve(), *folder.resolve().parents][:LEVELS]:
        if (here / mlflow_store.DATABASE).is_file():
            return mlflow_store.default_uri(here)
        uri = _in_summary(here / "summary.json")
        path = mlflow_store.sqlite_path(uri)
        if uri and (path is None or path.is_file()):
            return uri
    raise DataError(f"{shown(str(folder))}: no MLflow database; expected the output folder of a study")


def first_page(uri: str) -> str:
    """Path of the newest experiment's runs, in the pages for training; MLflow begins with those for language models."""
    path = mlflow_store.sqlite_path(uri)
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            newest = database.execute("select max(experiment_id) from experiments").fetchone()[0]
    except sqlite3.Error:
        newest = None
    return "/#/experiments" + (f"/{newest}/runs?workflowType=machine_learning" if newest else "")


def end_abandoned(uri: str) -> None:
    """End as KILLED the runs of killed studies, which MLflow would show as running; a study that goes on opens its own.

    Written to the tables, since MLflow needs seconds to load. A database that is locked or made otherwise is left as
    it is.
    """
    path = mlflow_store.sqlite_path(uri)
    open_in = "status = 'RUNNING' and run_uuid in (select run_uuid from tags where key = ? and value = ?)"
    with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=1)) as database:
        folders = database.execute("select distinct value from tags where key = ?", [FOLDER]).fetchall()
        for (folder,) in folders:
            there = holder(Path(folder))
            if there is None or there.alive is False:
                values = [int(1000 * time.time()), FOLDER, folder]
                database.execute(f"update runs set status = 'KILLED', end_time = ? where {open_in}", values)
        database.commit()


def _in_summary(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["mlflow"]["uri"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _server(uri: str, port: int, log: Path, token: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """A server in a process group of its own; the whole group is gone afterwards."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--host", HOST, "--port", str(port), "--no-serve-artifacts"]
    command += ["--gunicorn-opts", f"--config python:{ui_guard.__name__}"]
    environment = mlflow_store.environment()
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", ui_guard.TOKEN: token}
    environment[ui_guard.PAGE] = first_page(uri)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end tells the server of ours
            stdout=output,
            stderr=output,
            env=environment,
            cwd=log.parent,
            start_new_session=True,
        )
    finally:
        os.close(output)
    try:
        yield server, f"http://{HOST}:{port}"
    finally:
        _stop(server)


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    """Return when the server answers."""
    end = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < end:
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise RunFailed(f"the MLflow server did not start; see {shown(str(log))}")


def _stop(server: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(STOP_S)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A plain `kill` must stop the server too."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
