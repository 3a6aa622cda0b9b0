"""A real Slurm cluster for tests, started and stopped by `tools/slurm_cluster.sh`."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "slurm_cluster.sh"
SYSTEM_PROGRAMS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])


@dataclass(frozen=True)
class Cluster:
    """A running cluster and the environment for Slurm's commands."""

    folder: Path
    env: Mapping[str, str]

    def run(self, *command: str) -> str:
        """Return the output of a command without the final newline; fail the test if it fails."""
        return _output(*command, env=self.env)

    def states(self, job: str) -> dict[str, str]:
        """Return the state of a job, or of every task of an array, by id: from `sacct`, or until it knows `squeue`.

        Only `sacct` shows NODE_FAIL, until the job may start again. But it needs seconds to list an array's tasks, and
        shows the last one's state for the whole array until then.
        """
        listed = _table(self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T", "-j", job))
        recorded = _table(self.run("sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", job))
        return {number: recorded.get(number, state) for number, state in listed.items()}

    def wait_for(self, job: str, *states: str, seconds: float) -> None:
        """Wait until the job, and every task of an array, is in one of these states. Raises ``TimeoutError``."""
        end = time.monotonic() + seconds
        while not set((seen := self.states(job)).values()) <= set(states):
            if time.monotonic() > end:
                raise TimeoutError(f"job {job}: {seen} after {seconds} s, expected {' or '.join(states)}")
            time.sleep(0.1)

    def kill(self, node: str) -> None:
        """Simulate a power cut of a node."""
        call_script("kill", self.folder, node)

    def revive(self, node: str) -> None:
        """Start the node and return when it accepts jobs."""
        call_script("revive", self.folder, node)


def missing_requirements() -> str | None:
    """Return what this machine lacks for a Slurm cluster; None if nothing."""
    if sys.platform != "linux":
        return "Slurm runs on Linux only"
    if os.geteuid() != 0:
        return "only root can start a Slurm"
    if not any(shutil.which(program, path=SYSTEM_PROGRAMS) for program in ("slurmctld", "apt-get")):
        return "neither Slurm nor apt-get to install it"
    if not _own_address().startswith("127."):
        return "the host name does not resolve to loopback, where Slurm would listen"
    return None


@contextmanager
def running(*options: str) -> Iterator[Cluster]:
    """Start a cluster in a new folder with a short path (for sockets); remove it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        call_script("start", folder, *options)
        try:
            yield Cluster(folder, _environment(folder / "env.sh"))
        finally:
            call_script("stop", folder, "--purge")
    finally:
        shutil.rmtree(folder)


def call_script(command: str, folder: Path, *options: str) -> str:
    """Return the output of the script."""
    return _output(str(SCRIPT), command, str(folder), *options, env=os.environ)


def _table(text: str) -> dict[str, str]:
    """Return the first word of the second column by the first column."""
    rows = (line.split("|") for line in text.splitlines())
    return {number: state.split()[0] for number, state in rows}


def _output(*command: str, env: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}"
    return done.stdout.rstrip("\n")


def _environment(script: Path) -> dict[str, str]:
    listed = _output("bash", "-c", '. "$0" && env -0', str(script), env=os.environ)
    return dict(entry.split("=", 1) for entry in listed.rstrip("\0").split("\0"))


def _own_address() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
