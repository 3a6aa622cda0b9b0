"""An MLflow server behind a proxy that simulates faults of a server or network, and followers as processes.

Followers are forked from a process that has imported MLflow once.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

Fault = Literal["open", "refuse", "500", "hang", "slow"]

SLOW_S = 5.0
TIMEOUT_S = 2  # of a follower's requests
PRELOADED = ["torch", "mlflow.pyfunc", "mlflow.server", "modis_dist.evaluate.predictor"]
PRELOADED += ["modis_dist.integrations.mlflow.follower"]
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Gate:
    """A proxy that forwards requests to a server, or simulates a fault."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener: socketserver.ThreadingTCPServer | None = None
        self.fault: Fault = "open"
        self.release = threading.Event()
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set_fault(self, fault: Fault) -> None:
        """Simulate a fault, or none (``open``)."""
        self.fault = fault
        self.release.set()  # connections that hang
        self.release = threading.Event()
        if fault == "refuse":
            self.close()
        elif self._listener is None:
            gate = self

            class Handler(socketserver.BaseRequestHandler):
                def handle(self) -> None:
                    gate._serve(self.request)

            socketserver.ThreadingTCPServer.allow_reuse_address = True
            self._listener = socketserver.ThreadingTCPServer(("127.0.0.1", self.port), Handler)
            self._listener.daemon_threads = True
            threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    def _serve(self, client: socket.socket) -> None:
        if self.fault == "hang":
            self.release.wait(60)
            return
        if self.fault == "500":
            client.recv(1 << 16)
            client.sendall(ERROR)
            return
        with socket.create_connection(("127.0.0.1", self._server_port)) as server:
            back = threading.Thread(target=_pass, args=(server, client, lambda: True), daemon=True)
            back.start()
            _pass(client, server, self._forwards)
            back.join(5)

    def _forwards(self) -> bool:
        """Return True if a part of a request is to be forwarded; if the fault is ``slow``, wait first."""
        if self.fault == "slow":
            self.release.wait(SLOW_S)
        return self.fault in {"open", "slow"}


def _pass(source: socket.socket, target: socket.socket, lets_through: Callable[[], bool]) -> None:
    with contextlib.suppress(OSError):
        while (part := source.recv(1 << 16)) and lets_through():
            target.sendall(part)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


class Server:
    """A real MLflow server with its own database."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.database = folder / "mlflow.db"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = int(sock.getsockname()[1])
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--default-artifact-root", str(self._folder / "artifacts"), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1", "--gunicorn-opts", "--threads 2"]
        environment = dict(os.environ, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
        with (self._folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        end = time.monotonic() + 120
        while time.monotonic() < end and self._process.poll() is None:
            page = f"http://127.0.0.1:{self.port}/health"
            with contextlib.suppress(OSError), urllib.request.urlopen(page, timeout=5):
                break
            time.sleep(0.1)

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def follower_process(folder: Path, uri: str, *, read_only: Path | None = None) -> Any:
    """Start and return a follower of a run folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_follow, args=(folder, uri, read_only))
    process.start()
    return process


def _follow(folder: Path, uri: str, read_only: Path | None) -> None:
    os.environ |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(TIMEOUT_S)}
    if read_only is not None:
        _make_read_only(str(read_only))
    log = os.open(folder / "follower.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from modis_dist.integrations.mlflow import follower

    follower.FIRST_PAUSE_S, follower.LONGEST_PAUSE_S, follower.POLL_S, follower.REST_FACTOR = 0.1, 0.5, 0.05, 1
    os.setpriority = os.sched_setscheduler = lambda *_: None  # it would starve on a busy machine
    follower.follow(folder, uri)


def _make_read_only(path: str) -> None:
    """Make a path read-only for this process, even for root."""
    new_mounts = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts) != 0:
        raise PermissionError(ctypes.get_errno(), "unshare")
    for options in (["--make-rprivate", "/"], ["--bind", path, path], ["-o", "remount,ro,bind", path]):
        subprocess.run(["mount", *options], check=True)
