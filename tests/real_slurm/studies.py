"""A small study on a real Slurm, and what may happen to it there."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modis_dist.config import yaml12
from modis_dist.integrations.slurm.job_notes import read_note
from modis_dist.integrations.slurm.submission_status import submission_status
from tests.integrations.processes import wait_for
from tests.real_slurm.cluster import Cluster
from tests.study.toy_study import COMMAND, tree

EPOCHS = 60  # long enough for every disturbance while they wait, short enough when they do not
SLOWED = Path(__file__).parent / "slowed"
PARTS = ("trials", "best", "test", "baseline", "groups", "failures", "conditions")  # of a summary that must be equal


def write_study(path: Path, store: Path, *, epochs: int = EPOCHS, folds: int = 2) -> Path:
    """A study of as many packs as folds, which are trained on one thread each, to their last epoch."""
    study = tree(store, grid={}, folds=folds, packing={"enabled": False}, resources={"cpus": 1})
    study["optim"] |= {"epochs": epochs, "batch_size": 24}
    study["trainer"] |= {"early_stopping": None, "device": "cpu"}  # the GPUs of the emulated nodes are made up
    path.write_text(yaml12.dump(study))
    return path


def write_profile(path: Path, **keys: Any) -> Path:
    """A profile of small jobs in the partition that is preempted."""
    site = {"partition": "low", "cpus": 1, "memory": "1200M", "time": "01:00:00", "warning_s": 20, "at_once": 2}
    path.write_text(yaml12.dump(site | keys))
    return path


def command(*words: str, code: int = 0, held: Path | None = None, program: Sequence[str] = COMMAND) -> str:
    """What one of our commands prints; one that leaves with another code fails the test with what it said.

    ``held``: epochs of the jobs that it submits wait while this file is there.
    """
    environment = dict(os.environ)
    if held is not None:
        paths = [str(SLOWED), str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TEST_HELD": str(held)}
    done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Submitted:
    """A study that was submitted."""

    cluster: Cluster
    out: Path

    @property
    def held(self) -> Path:
        """While this file is there its trainings hardly go on."""
        return self.out.with_name("held")

    @property
    def number(self) -> str:
        """Of the job that was sent first."""
        sent = json.loads((self.out / "submission" / "submission.json").read_text())["sent"]
        return str(sent[0]["number"])

    def starts(self, name: str) -> int:
        """How often a job of a name was begun."""
        note = read_note(self.out / "submission" / "status" / f"{name}.json")
        return note.starts if note else 0

    def until_saved(self) -> None:
        """Until every pack that there is has a checkpoint, and there is one."""
        self.until(self._all_saved, "no checkpoint of each pack")

    def _all_saved(self) -> bool:
        packs = list((self.out / "packs").glob("*")) if (self.out / "packs").exists() else []
        return len(packs) >= 2 and all(list(pack.glob("last/step-*")) for pack in packs)

    def until_started(self, *names: str, times: int) -> None:
        """Until jobs of some names were begun so often."""
        self.until(lambda: all(self.starts(name) >= times for name in names), f"{names} were not begun {times} times")

    def until(self, true: Callable[[], object], why: str) -> None:
        """Wait; fails the test with what the jobs printed."""
        assert wait_for(true, seconds=480, every_s=0.5), f"{why}: {self.cluster.run('squeue')}\n{self.logs()}"

    def until_over(self) -> dict[str, Any]:
        """The summary, once no job of it is left."""
        self.held.unlink(missing_ok=True)
        self.until(lambda: self.state() not in {"running", "waiting"}, "it does not end")
        assert self.state() == "finished", self.logs()
        return summary(self.out)

    def state(self) -> str:
        """In one word."""
        return submission_status(self.out).state

    def logs(self) -> str:
        """What all jobs printed."""
        return "\n".join(path.read_text() for path in sorted((self.out / "submission" / "logs").glob("*.log")))

    def node(self, job: str) -> str:
        """The node that runs a job, the first of several."""
        return self.cluster.run("squeue", "-h", "-j", job, "-o", "%B")

    def preempt(self, job: str) -> None:
        """A job of more priority takes the node of a job for a moment."""
        wanted = [f"--nodelist={self.node(job)}", "--partition=high", "--exclusive", "--time=5", "--output=/dev/null"]
        self.cluster.run("sbatch", *wanted, "--wrap=sleep 1")

    def lose(self, job: str) -> None:
        """The node of a job loses its power for a moment."""
        node = self.node(job)
        self.cluster.kill(node)
        self.cluster.revive(node)


def submitted(cluster: Cluster, study: Path, profile: Path, out: Path, *words: str, held: bool = False) -> Submitted:
    """Submit a study; ``held``: one that lasts until its file is removed."""
    sent = Submitted(cluster, out)
    if held:
        sent.held.touch()
    command(
        "submit", str(study), "--cluster", str(profile), "--out", str(out), *words, held=sent.held if held else None
    )
    return sent


def summary(out: Path) -> dict[str, Any]:
    """What a study came to."""
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def processes_of_job(job: str) -> list[str]:
    """The names of living processes in whose environment a job's number stands."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_JOB_ID={job}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.append((place / "comm").read_text().strip())
        except OSError:
            continue  # gone
    return found


def readable_by_others(out: Path) -> list[str]:
    """The files and folders that others than their owner may read."""
    walked = [Path(place) / name for place, folders, names in os.walk(out) for name in [*folders, *names]]
    return [str(path) for path in walked if not path.is_symlink() and path.stat().st_mode & 0o077]
