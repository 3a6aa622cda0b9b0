"""An MLflow server behind a gate that can be shut in every way a server is unreachable, and studies as processes.

Studies are forked from a process that has imported everything once; they share nothing else with the tests.
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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

Fault = Literal["open", "refuse", "500", "hang", "slow"]

SLOW_S = 5.0
PATIENCE_S = 0.5  # of a study's end
READ_ONLY = "TEST_READ_ONLY"  # a file that the study can only read
PRELOADED = ["torch", "torch._dynamo", "mlflow", "sklearn.linear_model", "matplotlib.pyplot", "modis_dist.study.run"]
PRELOADED += [
    "modis_dist.cli.main",
    "modis_dist.cli.tune",
    "modis_dist.cli.display",
    "modis_dist.integrations.mlflow.mirror",
]
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Gate:
    """A port that passes everything to a server, or not. ``requests`` counts the connections that it got."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener: socketserver.ThreadingTCPServer | None = None
        self.fault: Fault = "open"
        self.requests = 0
        self.release = threading.Event()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def be(self, fault: Fault) -> None:
        """Behave in a way from now on."""
        self.fault = fault
        self.release.set()  # who hangs since earlier
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
        """Listen no more."""
        if self._listener is not None:
            self._listener.shutdown()
            self._listener.server_close()
            self._listener = None

    def _serve(self, client: socket.socket) -> None:
        self.requests += 1
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
            _pass(client, server, self._lets_through)
            back.join(5)

    def _lets_through(self) -> bool:
        """Whether a part of a request may go on, in the end."""
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


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[int]:
    """A real MLflow server on a database of its own; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--default-artifact-root", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--gunicorn-opts", "--threads 2"]
    environment = dict(os.environ, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false", MLFLOW_DISABLE_TELEMETRY="true")
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(0.1)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def study_process(arguments: list[str], stderr: Path, environment: Mapping[str, str]) -> Any:
    """A study that runs in a process of its own; to be started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context.Process(target=_live, args=(arguments, str(stderr), dict(environment)))


def _live(arguments: list[str], stderr: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if READ_ONLY in environment:
        _make_read_only(environment[READ_ONLY])
    said = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    from modis_dist.cli import main, tune
    from modis_dist.execution import run_pack
    from modis_dist.integrations.mlflow import apart as mlflow_apart
    from modis_dist.integrations.mlflow import mirror as mlflow_mirror
    from modis_dist.report import drawing

    run_pack.draw = lambda *_: None  # figures would take most of the time
    drawing.save = lambda *_: None
    tune.MLFLOW_PATIENCE_S = float(environment.get("TEST_PATIENCE_S", PATIENCE_S))
    mlflow_mirror.FIRST_PAUSE_S = 0.1
    mlflow_apart.get_context = lambda _: multiprocessing.get_context("fork")  # all is loaded here
    mlflow_apart.LOWEST = 0  # on a busy machine it would not be in time for what is tested
    mlflow_apart._give_way = lambda: None
    code = main.run(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as at the end of a real process: what MLflow still owes is not waited for


def _make_read_only(path: str) -> None:
    """For this process alone, root or not."""
    new_mounts = 0x20000
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts) != 0:
        raise PermissionError(ctypes.get_errno(), "unshare")
    for options in (["--make-rprivate", "/"], ["--bind", path, path], ["-o", "remount,ro,bind", path]):
        subprocess.run(["mount", *options], check=True)
