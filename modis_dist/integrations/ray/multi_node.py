"""A private Ray cluster on all nodes of a Slurm job: a process on each node starts and ends Ray there.

The rendezvous folder, which all nodes see, contains the token, the head's address, a file per node that joined, and at
the end the stop file. A signal cannot stop Ray: Slurm signals every process of the job when the driver must save, and
the driver needs Ray for that.
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

from modis_dist.integrations.ray.private_cluster import environment, short_parent, temporary_folder, worker_environment
from modis_dist.integrations.ray.reaper import TOKEN, processes_of
from modis_dist.integrations.rendezvous import LOOPBACK, names_in, own_address
from modis_dist.runtime.errors import Interrupted, MachineFailed, RunFailed
from modis_dist.runtime.files import write_text

ADDRESS, STOP_FILE, JOINED = "address", "stop", "joined-{}"
JOIN_S = 600.0  # for Ray to start on every node; loading Python on many nodes from one file system takes minutes
END_S = 90.0  # for Ray to end on every node; a node may see the stop file a minute late
FIRST_PORT, PORTS = 20000, 10000  # of heads; below the ephemeral ports
POLL_S = 0.25
TERMINATE_S = 2.0  # for Ray's processes to end after SIGTERM
STORE_BYTES = 200_000_000  # of Ray's object store; trainings share no objects
STARTED = "Ray runtime started"
IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def ray_on_nodes(folder: Path, *, nodes: int, cpus: int, gpus: int, python: Sequence[str]) -> Iterator[str]:
    """Start Ray on all nodes of this Slurm job and yield ``HOST:PORT`` of its head. Ray ends with the block.

    ``folder`` is on a file system that all nodes see. Raises ``MachineFailed`` if Ray fails on a node, ``Interrupted``
    if a node does not join in time, so that the job is requeued.
    """
    rendezvous = folder / f"ray-{os.environ['SLURM_JOB_ID']}"
    shutil.rmtree(rendezvous, ignore_errors=True)  # left by the same job before it was requeued
    rendezvous.mkdir(mode=0o700)
    write_text(rendezvous / TOKEN, secrets.token_hex(32))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(rendezvous / TOKEN)}
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cpus}"]
    command += ["--overlap", "--kill-on-bad-exit=1", *([f"--gres=gpu:{gpus}"] if gpus else [])]
    command += [*python, "-m", "modis_dist", "job", "node", str(rendezvous), f"--cpus={cpus}", f"--gpus={gpus}"]
    with environment(token), subprocess.Popen(command, stdin=subprocess.DEVNULL) as running:
        try:
            _wait_for_nodes(rendezvous, running, nodes=nodes)
            yield (rendezvous / ADDRESS).read_text()
        finally:
            (rendezvous / STOP_FILE).touch()
            with suppress(subprocess.TimeoutExpired):
                running.wait(END_S)
            running.kill()
            shutil.rmtree(rendezvous, ignore_errors=True)


def _wait_for_nodes(rendezvous: Path, running: "subprocess.Popen[bytes]", *, nodes: int) -> None:
    end = time.monotonic() + JOIN_S
    expected = {JOINED.format(number) for number in range(nodes)}
    while missing := expected - names_in(rendezvous, me="driver"):
        if running.poll() is not None:
            raise MachineFailed("Ray did not start on the nodes of this job; see the job's log")
        if time.monotonic() > end:
            raise Interrupted(
                f"{len(missing)} of {nodes} nodes did not join Ray within {JOIN_S:.0f} s; see the job's log"
            )
        time.sleep(POLL_S)


def serve(rendezvous: Path, *, cpus: int, gpus: int) -> None:
    """Run Ray on this node until the stop file exists. Called by ``srun``, once on each node.

    Raises ``RunFailed`` if Ray ends earlier.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    rank = int(os.environ["SLURM_PROCID"])
    with temporary_folder(short_parent()) as folder:
        token = folder / TOKEN
        token.touch(mode=0o600)
        token.write_text((rendezvous / TOKEN).read_text())
        private = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        private |= {"RAY_memory_monitor_refresh_ms": "0", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        command = [*_command(rendezvous, rank), f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        command += [f"--temp-dir={folder / 'r'}", f"--object-store-memory={STORE_BYTES}", "--block"]
        command += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        log = folder / "ray.log"
        with environment({**worker_environment(), **private}), log.open("wb") as output:
            running = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_for_stop(rendezvous, rank, running, log)
        finally:
            _end_all(folder, running)


def _command(rendezvous: Path, rank: int) -> list[str]:
    """Return the ``ray start`` of a node; rank 0 is the head and writes its address."""
    host, start = own_address(), [sys.executable, "-m", "ray.scripts.scripts", "start"]
    address = [] if host in LOOPBACK else [f"--node-ip-address={host}"]  # Ray does not listen on loopback
    if rank == 0:
        port = _free_ports(FIRST_PORT + 2 * int(os.environ["SLURM_JOB_ID"]) % PORTS)
        write_text(rendezvous / ADDRESS, f"{host}:{port}")
        ports = [f"--port={port}", f"--ray-client-server-port={port + 1}"]
        return [*start, "--head", *ports, "--include-dashboard=false", *address]
    while not {ADDRESS, STOP_FILE} & names_in(rendezvous, me=str(rank)):
        time.sleep(POLL_S)
    return [*start, f"--address={(rendezvous / ADDRESS).read_text()}", *address]


def _free_ports(first: int) -> int:
    """Return the first of two neighbouring ports, from ``first`` on, that are free now."""
    for port in range(first, first + PORTS, 2):
        with suppress(OSError), socket.socket() as head, socket.socket() as client:
            head.bind(("", port))
            client.bind(("", port + 1))
            return port
    raise RunFailed(f"no port from {first} to {first + PORTS} is free on {socket.gethostname()}")


def _wait_for_stop(rendezvous: Path, rank: int, running: "subprocess.Popen[bytes]", log: Path) -> None:
    while STOP_FILE not in (names := _names(rendezvous, rank)):
        if running.poll() is not None:
            raise RunFailed(f"Ray ended on {socket.gethostname()}: {log.read_text(errors='replace').strip()[-2000:]}")
        if JOINED.format(rank) not in names and STARTED in log.read_text(errors="replace"):
            (rendezvous / JOINED.format(rank)).touch()
        time.sleep(POLL_S)


def _names(rendezvous: Path, rank: int) -> set[str]:
    """Return the files in the folder; the stop file if the folder is gone with its driver."""
    try:
        return names_in(rendezvous, me=str(rank))
    except FileNotFoundError:
        return {STOP_FILE}


def _end_all(folder: Path, running: "subprocess.Popen[bytes]") -> None:
    """End Ray's processes of this node, by SIGTERM first: killed agents leave files in shared memory."""
    running.terminate()
    end = time.monotonic() + TERMINATE_S
    while (left := processes_of(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        with suppress(OSError):
            os.kill(process, signal.SIGKILL)
    running.wait()
