"""Serve the MLflow UI of a study, on loopback and for its user only."""

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

from rich.console import Console

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import ui_guard
from modis_dist.integrations.mlflow.sync import describe, sync, tracking_uri
from modis_dist.runtime.errors import DataError, RunFailed
from modis_dist.runtime.text import shown
from modis_dist.study.manifest import is_study

HOST = "127.0.0.1"
START_S = 120.0
STOP_S = 10.0
LEVELS = 3  # folders from a trial to its study
LOG = "mlflow-ui.log"


def serve(folder: Path, *, port: int) -> int:
    """Update MLflow and serve its UI for the study of a folder until Ctrl-C; port 0 is any free port.

    Returns the exit code. Raises ``DataError`` if nothing was tracked, ``RunFailed`` if the server does not start.
    """
    root, uri = find(folder)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    is_server = mlflow_store.sqlite_path(uri) is None
    if is_server:
        console.print(f"tracking server: {uri}", markup=False, soft_wrap=True)
    with errors.status("updating MLflow"):
        problem = _update(root, uri)
    if problem:
        errors.print(f"note: MLflow is not up to date: {problem}", markup=False, soft_wrap=True)
    if is_server:
        return 0
    if not (root / mlflow_store.DATABASE).is_file() and uri == mlflow_store.default_uri(root):
        raise DataError(f"{shown(str(root))}: no MLflow database yet; try again in a minute")
    log, token = folder / LOG, secrets.token_urlsafe(24)
    with _sigterm_as_interrupt(), _server(uri, port or _free_port(), log, token) as (server, url):
        try:
            with console.status("starting MLflow"):
                _wait(server, url, log)
            console.print(f"MLflow: {url}/?token={token}   (Ctrl-C to stop)", markup=False, soft_wrap=True)
            return server.wait()
        except KeyboardInterrupt:
            return 0


def find(folder: Path) -> tuple[Path, str]:
    """Return the run folder that contains a folder, and the tracking URI of its study."""
    for root in [folder.resolve(), *folder.resolve().parents][:LEVELS]:
        if (root / mlflow_store.DATABASE).is_file():
            return root, mlflow_store.default_uri(root)
        if is_study(root):
            return root, tracking_uri(root)
    raise DataError(f"{shown(str(folder))}: no MLflow database; give the output folder of a study")


def _update(root: Path, uri: str) -> str:
    """Send what MLflow lacks, unless a follower does; return the problem, empty if there is none."""
    try:
        if is_study(root):
            sync(root, uri)
    except mlflow_store.Busy:
        pass
    except Exception as error:
        return describe(error, root, uri)
    return ""


def first_page(uri: str) -> str:
    """Return the page with the runs of the newest experiment; MLflow's default page is for language models."""
    path = mlflow_store.sqlite_path(uri)
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            newest = database.execute("select max(experiment_id) from experiments").fetchone()[0]
    except sqlite3.Error:
        newest = None
    return "/#/experiments" + (f"/{newest}/runs?workflowType=machine_learning" if newest else "")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        return int(sock.getsockname()[1])


@contextmanager
def _server(uri: str, port: int, log: Path, token: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """Start a server in a new process group; kill the whole group afterwards."""
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
            stdin=subprocess.PIPE,  # the server stops at its end of file, when this process is gone
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
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
