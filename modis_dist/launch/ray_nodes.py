"""A private Ray on all nodes of a Slurm job: one process of ours on each node starts Ray's there, and ends it.

They meet in a folder that all nodes see: it holds the token, the head's address, a file of each node that has joined,
and at the end the word to stop. That word is a file, since Slurm's signals mean the driver: it has its trainings save,
for which Ray must still be there.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from modis_dist.errors import RunFailed
from modis_dist.files import write_text
from modis_dist.launch.ray_cluster import environment, for_workers, short_parent, temporary_folder
from modis_dist.launch.ray_reaper import TOKEN, processes_of

ADDRESS, STOP_FILE, JOINED = "address", "stop", "joined-{}"
JOIN_S = 180.0  # for Ray to start on every node, whose file system may be slow
END_S = 20.0  # for Ray to end on every node
FIRST_PORT, PORTS = 20000, 10000  # of heads, below those that systems hand out
STORE_BYTES = 200_000_000  # of objects that workers share; trainings share none
STARTED = "Ray runtime started"
DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def ray_on_nodes(folder: Path, *, nodes: int, cpus: int, gpus: int, python: Sequence[str]) -> Iterator[str]:
    """Ray on all nodes of this process's job; yields ``HOST:PORT`` of its head. Nothing of it outlives the block.

    ``folder`` is on a file system that all nodes see. Raises ``RunFailed`` where a node does not join.
    """
    meeting = folder / f"ray-{os.environ['SLURM_JOB_ID']}"
    shutil.rmtree(meeting, ignore_errors=True)  # of the same job, before it was queued again
    meeting.mkdir(mode=0o700)
    write_text(meeting / TOKEN, secrets.token_hex(32))
    told = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(meeting / TOKEN)}
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    command += ["--overlap", "--kill-on-bad-exit=1", *([f"--gres=gpu:{gpus}"] if gpus else [])]
    command += [*python, "-m", "modis_dist", "job", "node", str(meeting), f"--cpus={cpus}", f"--gpus={gpus}"]
    with environment(told), subprocess.Popen(command, stdin=subprocess.DEVNULL) as running:
        try:
            _wait(meeting, running, nodes=nodes)
            yield (meeting / ADDRESS).read_text()
        finally:
            (meeting / STOP_FILE).touch()
            _ended(running)
            shutil.rmtree(meeting, ignore_errors=True)


def _wait(meeting: Path, running: "subprocess.Popen[bytes]", *, nodes: int) -> None:
    """Until every node has joined."""
    end = time.monotonic() + JOIN_S
    missing = [JOINED.format(number) for number in range(nodes)]
    while missing := [name for name in missing if not (meeting / name).exists()]:
        if running.poll() is not None:
            raise RunFailed("Ray did not start on the nodes of this job; the job's log says why")
        if time.monotonic() > end:
            raise RunFailed(
                f"{len(missing)} of {nodes} nodes did not join Ray within {JOIN_S:.0f} s; see the job's log"
            )
        time.sleep(0.1)


def _ended(running: "subprocess.Popen[bytes]") -> None:
    with suppress(subprocess.TimeoutExpired):
        running.wait(END_S)
    running.kill()


def serve(meeting: Path, *, cpus: int, gpus: int) -> None:
    """Keep Ray on this node until it is told to stop, or ends by itself. Run by ``srun``, once on each node.

    Raises ``RunFailed`` where Ray ends unasked.
    """
    for number in DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    rank = int(os.environ["SLURM_PROCID"])
    with temporary_folder(short_parent()) as folder:
        token = folder / TOKEN
        token.touch(mode=0o600)
        token.write_text((meeting / TOKEN).read_text())
        private = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        private |= {"RAY_memory_monitor_refresh_ms": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        command = [*_command(meeting, rank), f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        command += [f"--temp-dir={folder / 'r'}", f"--object-store-memory={STORE_BYTES}", "--block"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        said = folder / "said.txt"
        with environment({**for_workers(), **private}), said.open("wb") as told:
            running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=subprocess.STDOUT)
        try:
            _serve(meeting, rank, running, said)
        finally:
            _end_all(folder, running)


def _command(meeting: Path, rank: int) -> list[str]:
    """``ray start`` of a node; the first is the head, and says where it is."""
    host = _address()
    here = [f"--node-ip-address={host}"] if host else []
    if rank == 0:
        port = FIRST_PORT + int(os.environ["SLURM_JOB_ID"]) % PORTS
        write_text(meeting / ADDRESS, f"{host or socket.gethostbyname(socket.gethostname())}:{port}")
        return [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            f"--port={port}",
            *here,
            "--include-dashboard=false",
        ]
    while not (meeting / ADDRESS).exists() and not (meeting / STOP_FILE).exists():
        time.sleep(0.1)
    return [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={(meeting / ADDRESS).read_text()}", *here]


def _address() -> str | None:
    """The address of this node's name; None where the name leads nowhere, or to what others cannot reach."""
    with suppress(OSError):
        found = socket.gethostbyname(os.environ.get("SLURMD_NODENAME", socket.gethostname()))
        return None if found in {"127.0.0.1", "127.0.1.1"} else found
    return None


def _serve(meeting: Path, rank: int, running: "subprocess.Popen[bytes]", said: Path) -> None:
    while not (meeting / STOP_FILE).exists() and meeting.exists():
        if running.poll() is not None:
            raise RunFailed(f"Ray ended on {socket.gethostname()}: {said.read_text(errors='replace').strip()[-2000:]}")
        if not (meeting / JOINED.format(rank)).exists() and STARTED in said.read_text(errors="replace"):
            (meeting / JOINED.format(rank)).touch()
        time.sleep(0.2)


def _end_all(folder: Path, running: "subprocess.Popen[bytes]") -> None:
    """End Ray's processes of this node, gently first: agents that are killed leave files in shared memory."""
    running.terminate()
    end = time.monotonic() + END_S / 4
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    running.wait()
