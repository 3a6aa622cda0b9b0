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

from modis_dist.integrations.ray.private_cluster import environment, for_workers, short_parent, temporary_folder
from modis_dist.integrations.ray.reaper import TOKEN, processes_of
from modis_dist.integrations.rendezvous import LOOPBACK, names_in, own_address
from modis_dist.runtime.errors import Interrupted, MachineFailed, RunFailed
from modis_dist.runtime.files import write_text

ADDRESS, STOP_FILE, JOINED = "address", "stop", "joined-{}"
JOIN_S = 600.0  # for Ray to start on every node: many that load Python from one file system at once take minutes
END_S = 90.0  # for Ray to end on every node, whose view of the folder may be a minute old
FIRST_PORT, PORTS = 20000, 10000  # of heads, below those that systems hand out
LOOK_S = 0.25
GENTLE_S = 2.0  # for Ray's processes to end by themselves
STORE_BYTES = 200_000_000  # of objects that workers share; trainings share none
STARTED = "Ray runtime started"
DEAF_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def ray_on_nodes(folder: Path, *, nodes: int, cpus: int, gpus: int, python: Sequence[str]) -> Iterator[str]:
    """Ray on all nodes of this process's job; yields ``HOST:PORT`` of its head. Nothing of it outlives the block.

    ``folder`` is on a file system that all nodes see. Raises ``MachineFailed`` where Ray fails on a node,
    ``Interrupted`` where one does not join in time: other nodes may.
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
    wanted = {JOINED.format(number) for number in range(nodes)}
    while missing := wanted - names_in(meeting, me="driver"):
        if running.poll() is not None:
            raise MachineFailed("Ray did not start on the nodes of this job; the job's log says why")
        if time.monotonic() > end:
            raise Interrupted(
                f"{len(missing)} of {nodes} nodes did not join Ray within {JOIN_S:.0f} s; see the job's log"
            )
        time.sleep(LOOK_S)


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
    host, start = own_address(), [sys.executable, "-m", "ray.scripts.scripts", "start"]
    here = [] if host in LOOPBACK else [f"--node-ip-address={host}"]  # Ray would not listen to these
    if rank == 0:
        port = _free_ports(FIRST_PORT + 2 * int(os.environ["SLURM_JOB_ID"]) % PORTS)
        write_text(meeting / ADDRESS, f"{host}:{port}")
        ports = [f"--port={port}", f"--ray-client-server-port={port + 1}"]
        return [*start, "--head", *ports, "--include-dashboard=false", *here]
    while not {ADDRESS, STOP_FILE} & names_in(meeting, me=str(rank)):
        time.sleep(LOOK_S)
    return [*start, f"--address={(meeting / ADDRESS).read_text()}", *here]


def _free_ports(first: int) -> int:
    """The first of two ports, these or the next ones, that nobody listens at now."""
    for port in range(first, first + PORTS, 2):
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("", port))
            other.bind(("", port + 1))
            return port
    raise RunFailed(f"no port from {first} to {first + PORTS} is free on {socket.gethostname()}")


def _serve(meeting: Path, rank: int, running: "subprocess.Popen[bytes]", said: Path) -> None:
    while STOP_FILE not in (names := _names(meeting, rank)):
        if running.poll() is not None:
            raise RunFailed(f"Ray ended on {socket.gethostname()}: {said.read_text(errors='replace').strip()[-2000:]}")
        if JOINED.format(rank) not in names and STARTED in said.read_text(errors="replace"):
            (meeting / JOINED.format(rank)).touch()
        time.sleep(LOOK_S)


def _names(meeting: Path, rank: int) -> set[str]:
    """The files in the folder; the word to stop where the folder is gone with its driver."""
    try:
        return names_in(meeting, me=str(rank))
    except FileNotFoundError:
        return {STOP_FILE}


def _end_all(folder: Path, running: "subprocess.Popen[bytes]") -> None:
    """End Ray's processes of this node, gently first: agents that are killed leave files in shared memory."""
    running.terminate()
    end = time.monotonic() + GENTLE_S
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    running.wait()
