"""A real Slurm for tests: started and stopped by `tools/slurm_cluster.sh`, asked by Slurm's own commands."""

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
    """A cluster that runs, and the environment in which Slurm's commands reach it."""

    folder: Path
    env: Mapping[str, str]

    def run(self, *command: str) -> str:
        """What a command prints, without the last line's end; one that fails fails the test with what it said."""
        return _output(*command, env=self.env)

    def states(self, job: str) -> dict[str, str]:
        """The state of a job, or of every task of an array, by its number: what `sacct` says, and until then `squeue`.

        Only `sacct` shows a job whose node failed as NODE_FAIL, until it may start again. But it takes seconds to know
        an array's tasks, and meanwhile shows the last one's state as if it were the whole array's.
        """
        listed = _table(self.run("squeue", "-h", "-r", "-t", "all", "-o", "%i|%T", "-j", job))
        recorded = _table(self.run("sacct", "-n", "-P", "-X", "-o", "JobID,State", "-j", job))
        return {number: recorded.get(number, state) for number, state in listed.items()}

    def wait_for(self, job: str, *states: str, seconds: float) -> None:
        """Until the job, and every task of an array, is in one of these states; TimeoutError after some seconds."""
        end = time.monotonic() + seconds
        while not set((seen := self.states(job)).values()) <= set(states):
            if time.monotonic() > end:
                raise TimeoutError(f"job {job}: {seen} after {seconds} s, expected {' or '.join(states)}")
            time.sleep(0.1)

    def kill(self, node: str) -> None:
        """Cuts the node's power."""
        call_script("kill", self.folder, node)

    def revive(self, node: str) -> None:
        """Comes back when the node takes jobs again."""
        call_script("revive", self.folder, node)


def why_not() -> str | None:
    """What this machine lacks for a Slurm; None where nothing does."""
    if sys.platform != "linux":
        return "Slurm runs on Linux only"
    if os.geteuid() != 0:
        return "only root can start a Slurm"
    if not any(shutil.which(program, path=SYSTEM_PROGRAMS) for program in ("slurmctld", "apt-get")):
        return "neither Slurm nor apt-get to install it"
    if not _own_address().startswith("127."):
        return "the host's name does not lead to loopback, where Slurm would listen"
    return None


@contextmanager
def running(*options: str) -> Iterator[Cluster]:
    """A cluster in a new folder, whose path is short as sockets need it; nothing is left of it afterwards."""
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
    """What the script prints."""
    return _output(str(SCRIPT), command, str(folder), *options, env=os.environ)


def _table(text: str) -> dict[str, str]:
    """The second column by the first; of a state, whose user may follow, the first word."""
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
