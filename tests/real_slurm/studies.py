"""A small study on a real Slurm cluster, and interruptions of its jobs."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modis_dist.config import yaml12
from modis_dist.integrations.slurm.job_status import read_job_status
from modis_dist.integrations.slurm.submission_status import submission_status
from tests.integrations.processes import wait_for
from tests.real_slurm.cluster import Cluster
from tests.study.toy_study import COMMAND, tree

EPOCHS = 60  # few, because jobs pause during interruptions
SLOWED = Path(__file__).parent / "slowed"
PARTS = ("trials", "best", "test", "baseline", "groups", "failures", "conditions")  # of a summary: must be equal


def write_study(path: Path, store: Path, *, epochs: int = EPOCHS, folds: int = 2) -> Path:
    """Write a study with one pack per fold, each trained on one thread to its last epoch."""
    study = tree(store, grid={}, folds=folds, packing={"enabled": False}, resources={"cpus": 1})
    study["optim"] |= {"epochs": epochs, "batch_size": 24}
    study["trainer"] |= {"early_stopping": None, "device": "cpu"}  # the GPUs of the nodes are emulated
    path.write_text(yaml12.dump(study))
    return path


def write_profile(path: Path, **keys: Any) -> Path:
    """Write a profile of small jobs in the partition that can be preempted."""
    site = {
        "partition": "low",
        "cpus": 1,
        "memory": "1200M",
        "time": "01:00:00",
        "warning_s": 20,
        "array_parallelism": 2,
    }
    path.write_text(yaml12.dump(site | keys))
    return path


def command(*words: str, code: int = 0, paused: Path | None = None, program: Sequence[str] = COMMAND) -> str:
    """Return the output of a modis-dist command; fail the test on another exit code.

    ``paused``: trainings of the submitted jobs pause while this file exists.
    """
    environment = dict(os.environ)
    if paused is not None:
        paths = [str(SLOWED), str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TEST_PAUSED": str(paused)}
    done = subprocess.run([*program, *words], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Submitted:
    """A submitted study."""

    cluster: Cluster
    out: Path

    @property
    def paused(self) -> Path:
        """File that pauses the trainings while it exists."""
        return self.out.with_name("paused")

    @property
    def number(self) -> str:
        """Id of the first job."""
        sent = json.loads((self.out / "submission" / "submission.json").read_text())["sent"]
        return str(sent[0]["number"])

    def starts(self, name: str) -> int:
        """Return the number of starts of a job."""
        job_status = read_job_status(self.out / "submission" / "status" / f"{name}.json")
        return job_status.starts if job_status else 0

    def until_saved(self) -> None:
        """Wait until every pack has a checkpoint."""
        self.until(self._all_saved, "no checkpoint of each pack")

    def _all_saved(self) -> bool:
        packs = list((self.out / "packs").glob("*")) if (self.out / "packs").exists() else []
        return len(packs) >= 2 and all(list(pack.glob("last/step-*")) for pack in packs)

    def until_started(self, *names: str, times: int) -> None:
        """Wait until jobs have started a number of times."""
        self.until(lambda: all(self.starts(name) >= times for name in names), f"{names} did not start {times} times")

    def until(self, true: Callable[[], object], reason: str) -> None:
        """Wait for a condition; fail the test with the logs of the jobs."""
        assert wait_for(true, seconds=480, every_s=0.5), f"{reason}: {self.cluster.run('squeue')}\n{self.logs()}"

    def until_over(self) -> dict[str, Any]:
        """Wait for the end and return the summary."""
        self.paused.unlink(missing_ok=True)
        self.until(lambda: self.state() not in {"running", "waiting"}, "the study does not end")
        assert self.state() == "finished", self.logs()
        return summary(self.out)

    def state(self) -> str:
        """Return the state of the submission."""
        return submission_status(self.out).state

    def logs(self) -> str:
        """Return the logs of all jobs."""
        return "\n".join(path.read_text() for path in sorted((self.out / "submission" / "logs").glob("*.log")))

    def node(self, job: str) -> str:
        """Return the first node of a job."""
        return self.cluster.run("squeue", "-h", "-j", job, "-o", "%B")

    def preempt(self, job: str) -> None:
        """Preempt a job: run a short job of higher priority on its node."""
        request = [f"--nodelist={self.node(job)}", "--partition=high", "--exclusive", "--time=5", "--output=/dev/null"]
        self.cluster.run("sbatch", *request, "--wrap=sleep 1")

    def lose(self, job: str) -> None:
        """Kill the node of a job and revive it."""
        node = self.node(job)
        self.cluster.kill(node)
        self.cluster.revive(node)


def submitted(cluster: Cluster, study: Path, profile: Path, out: Path, *words: str, paused: bool = False) -> Submitted:
    """Submit a study; ``paused``: its trainings pause until the file is removed."""
    sent = Submitted(cluster, out)
    if paused:
        sent.paused.touch()
    command(
        "submit",
        str(study),
        "--cluster",
        str(profile),
        "--out",
        str(out),
        *words,
        paused=sent.paused if paused else None,
    )
    return sent


def summary(out: Path) -> dict[str, Any]:
    """Return the summary of a study."""
    content: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return content


def processes_of_job(job: str) -> list[str]:
    """Return the names of the running processes of a job."""
    content = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_JOB_ID={job}".encode() in (place / "environ").read_bytes().split(b"\0"):
                content.append((place / "comm").read_text().strip())
        except OSError:
            continue  # gone
    return content


def readable_by_others(out: Path) -> list[str]:
    """Return the files and folders that other users may read."""
    walked = [Path(place) / name for place, folders, names in os.walk(out) for name in [*folders, *names]]
    return [str(path) for path in walked if not path.is_symlink() and path.stat().st_mode & 0o077]


def assert_equals_local_run(actual: dict[str, Any], base: Path) -> None:
    """Assert that results are equal except for times and the MLflow store."""
    home = summary(base / "home")
    for part in PARTS:
        assert actual[part] == home[part], part
