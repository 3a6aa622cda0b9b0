"""A Ray cluster of two one-core nodes on this machine, started as on two machines: by `ray start`, with a token."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from modis_dist.integrations.ray import reaper as ray_reaper

NODES = ("127.0.0.11", "127.0.0.12")  # Ray counts nodes with the same address as one machine
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=0"]
SMALL = ["--object-store-memory=80000000", "--include-log-monitor=False", "--disable-usage-stats"]
OF_RAY = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinatorActor")
PATIENCE_S = 60.0


class TwoNodes:
    """A Ray cluster of two nodes: its address, and the environment with its token."""

    def __init__(self, folder: Path) -> None:
        self.address = f"{NODES[0]}:{_free_port()}"
        token = folder / ray_reaper.TOKEN
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = self.stranger | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start both nodes; return when they run."""
        port = self.address.rpartition(":")[2]
        self._start("h", "--head", f"--node-ip-address={NODES[0]}", f"--port={port}", "--include-dashboard=False")
        self._start("o", f"--address={self.address}", f"--node-ip-address={NODES[1]}")

    def _start(self, name: str, *options: str) -> None:
        log, environment = self._folder / f"{name}.log", dict(self.environment)
        environment.pop("PYTHONPATH", None)  # as on a node without this checkout
        with log.open("w") as log_file:
            command = [*START, *SMALL, *options, f"--temp-dir={self._folder / name}"]
            self._started.append(subprocess.Popen(command, env=environment, cwd="/", stdout=log_file, stderr=log_file))
        end = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < end and self._started[-1].poll() is None, log.read_text()
            time.sleep(0.1)

    def commands(self) -> list[str]:
        """Return the command lines of all running processes, including actors and tasks."""
        command_lines = []
        for pid in ray_reaper.processes_of(self._folder):
            with suppress(psutil.NoSuchProcess):
                command_lines.append(" ".join(psutil.Process(pid).cmdline()))
        return command_lines

    def workers(self) -> list[str]:
        """Return the running actors and tasks, without those of Ray itself."""
        named = [line.strip() for line in self.commands() if line.startswith("ray::")]
        return [name for name in named if name not in OF_RAY]

    def nodes(self) -> int:
        """Return the number of running nodes, the head included."""
        names = [Path(line.partition(" ")[0]).name for line in self.commands()]
        return names.count("raylet") if "gcs_server" in names else 0

    def stop(self) -> None:
        """Kill all processes."""
        end = time.monotonic() + PATIENCE_S
        while (running := ray_reaper.processes_of(self._folder)) and time.monotonic() < end:
            for pid in running:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for process in self._started:
            process.kill()
            process.wait()


@contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """Run a cluster of two nodes during the block."""
    folder = Path(tempfile.mkdtemp(prefix="given-"))  # 0700, and short: Ray's socket paths may have 107 bytes
    ray = TwoNodes(folder)
    try:
        ray.start()
        yield ray
    finally:
        ray.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind((NODES[0], 0))
        port: int = sock.getsockname()[1]
        return port
