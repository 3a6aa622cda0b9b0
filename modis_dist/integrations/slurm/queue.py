"""Slurm's queue: submit, list, cancel, requeue.

submitit runs sbatch and parses sacct; jobs are shell scripts, nothing is pickled. States come from squeue and sacct,
because submitit reports a requeued job as finished. Only this file uses submitit; two of the three names are not in its
public interface (``submitit``, ``submitit.helpers``), and `tests/integrations/slurm/test_submitit.py` fails if they
change.
"""

import os
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Protocol

from submitit.core.utils import FailedJobError
from submitit.helpers import CommandFunction
from submitit.slurm.slurm import SlurmInfoWatcher

from modis_dist.integrations.slurm.slurm_commands import one_line, run_command, without_job_variables
from modis_dist.runtime.errors import RunFailed, UserError

SPARE_NODES = 2  # a partition needs as many beyond those of a job before the job excludes one
LATE_S = 10.0  # for a job to appear in the queue if Slurm accepted it although sbatch failed
LIVE = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "SIGNALING"})
LIVE_PREFIXES = ("REQUEUE_", "SPECIAL_", "STAGE_", "STOPPED")
PENDING, PENDING_PREFIXES = frozenset({"PENDING", "REQUEUED"}), ("REQUEUE_", "SPECIAL_")
PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "srun")
NO_ANSWER = re.compile(  # errors after which sbatch may have submitted the job
    r"timed out|time-?out|contact|connect|communicat|zero bytes", re.IGNORECASE
)


class QueueUnknown(RunFailed):
    """Slurm does not answer; the state of the queue is unknown and nothing was changed."""


class NotSeen(UserError):
    """sbatch failed without an answer and the job is not in the queue; it may still appear."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as Slurm reports it."""

    id: str  # 123, or 123_4
    state: str  # Slurm's word
    reason: str = ""  # why it is pending
    nodes: str = ""

    @property
    def live(self) -> bool:
        """True if the job is pending or running, or will run again."""
        return self.state in LIVE or self.state.startswith(LIVE_PREFIXES)

    @property
    def runs(self) -> bool:
        """True if the job has nodes now."""
        return self.live and self.state not in PENDING and not self.state.startswith(PENDING_PREFIXES)


class Queue(Protocol):
    """A queue that runs jobs. Progress of a training is read from files, never from the queue."""

    def submit(self, text: str, *, folder: Path, mark: str, tasks: Sequence[int], after: Sequence[str]) -> str:
        """Submit a script that runs in ``folder`` after other jobs have ended; return the job id."""
        ...

    def marked(self, mark: str) -> str | None:
        """Return the id of the user's job with a mark; None if there is none."""
        ...

    def jobs(self, numbers: Sequence[str]) -> dict[str, Job]:
        """Return jobs by id, each task of an array separately."""
        ...

    def cancel(self, numbers: Sequence[str]) -> None:
        """Cancel jobs; jobs that have ended are ignored."""
        ...


class SlurmQueue:
    """Slurm's queue. Methods raise ``QueueUnknown`` if Slurm does not answer."""

    def submit(self, text: str, *, folder: Path, mark: str, tasks: Sequence[int], after: Sequence[str]) -> str:  # noqa: ARG002
        """Submit a script, which states its tasks; the mark is the job's comment. Raises ``UserError`` if refused."""
        _require_programs()
        script = folder / "scripts" / f"{mark}.sh"
        script.write_text(text)
        options = [f"--chdir={folder}", f"--comment={mark}"]
        if after:
            options += [f"--dependency=afterany:{':'.join(after)}"]
        try:
            with redirect_stderr(StringIO()), without_job_variables():  # submitit prints the error that it raises
                output = CommandFunction(["sbatch", *options, str(script)], verbose=False)()
        except FailedJobError as error:
            message = one_line(str(error), "sbatch")
            if not NO_ANSWER.search(message):
                raise UserError(f"sbatch: {message}") from None
            return self._late(mark, message)
        number = re.search(r"\bjob (\d+)", output)
        return number[1] if number else self._late(mark, one_line(output, "sbatch"))

    def _late(self, mark: str, message: str) -> str:
        """Return the id of a job that was accepted although sbatch did not print it.

        Raises ``NotSeen`` if squeue does not list it, ``QueueUnknown`` if squeue does not answer either.
        """
        end, answered = time.monotonic() + LATE_S, False
        while time.monotonic() < end:
            time.sleep(1)
            with suppress(QueueUnknown):
                if (number := self.marked(mark)) is not None:
                    return number
                answered = True
        if not answered:
            raise QueueUnknown(f"sbatch: {message}; it is unknown whether this job was submitted, try again later")
        raise NotSeen(f"sbatch: {message}")

    def marked(self, mark: str) -> str | None:
        lines = _query("squeue", "-h", "-u", str(os.getuid()), "-o", "%F|%k").splitlines()
        comments = (line.split("|", 1) for line in lines)
        return next((number for number, comment in comments if comment == mark), None)

    def jobs(self, numbers: Sequence[str]) -> dict[str, Job]:
        """Return live jobs from squeue and, if accounting is on, ended jobs from sacct.

        A job that is live in sacct but not in squeue is left out: accounting lags behind or lost its end.
        """
        if not numbers:
            return {}
        jobs = {job.id: job for job in _ended(numbers)}
        for line in _query("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r|%N").splitlines():
            name, state, reason, nodes = line.split("|", 3)
            if name.partition("_")[0] in numbers:
                jobs[name] = Job(name, state, reason if state != "RUNNING" and reason != "None" else "", nodes)
        arrays = {name.partition("_")[0] for name in jobs if "_" in name}
        return {name: job for name, job in jobs.items() if name not in arrays}  # sacct lists a new array as one job

    def cancel(self, numbers: Sequence[str]) -> None:
        if numbers:
            _query("scancel", *numbers)


def _ended(numbers: Sequence[str]) -> list[Job]:
    command = ["sacct", "-X", "--parsable2", "-o", "JobID,State,NodeList", "-j", ",".join(numbers)]
    try:
        rows = SlurmInfoWatcher().read_info(_query(*command))
    except QueueUnknown:
        return []  # a cluster without accounting
    jobs = [Job(name, row["State"].partition(" ")[0], "", row["NodeList"]) for name, row in rows.items()]
    return [job for job in jobs if not job.live]


def requeue(*, exclude: str | None = None) -> bool:
    """Requeue the job of this process and return True, unless Slurm has already decided otherwise.

    A job that was cancelled or requeued by others is left alone; one at its time limit is requeued even if it missed
    the warning. ``exclude``: a node to avoid, if the partition has enough others.
    """
    number = _own_number()
    output = _query("squeue", "-h", "-j", number, "-o", "%T|%r|%D|%P|%x").strip()
    state, reason, nodes, partition, excluded = (output.split("|") + [""] * 4)[:5]
    if state != "RUNNING" and reason != "TimeLimit":
        return False
    avoid = exclude is not None and _has_spare_nodes(partition, nodes)
    _query("scontrol", "requeue", number)
    if avoid:  # Slurm allows this for pending jobs only
        exclusions = ",".join(filter(None, [excluded, exclude]))
        with suppress(QueueUnknown):  # if the site forbids it, the job may run on the same node again
            _query("scontrol", "update", f"JobId={number}", f"ExcNodeList={exclusions}")
    return True


def _has_spare_nodes(partition: str, nodes: str) -> bool:
    """Return whether a partition has enough other nodes; a job that excludes too many is pending forever."""
    with suppress(QueueUnknown, ValueError):
        total = sum(map(int, _query("sinfo", "-h", "-p", partition, "-o", "%D").split()))
        return total >= int(nodes) + SPARE_NODES
    return False


def _own_number() -> str:
    """Return the id of this job; ARRAY_TASK for a task, because the job id of one task is that of the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def _require_programs() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"{missing[0]} not found on PATH: submit from a login node of the cluster, or use --cluster "
            "cluster/local.yaml to run the jobs on this machine"
        )


def _query(*command: str) -> str:
    """Return the output of one of Slurm's commands. Raises ``QueueUnknown`` if it fails."""
    if shutil.which(command[0]) is None:
        raise QueueUnknown(f"{command[0]} not found on PATH; run this on a login node of the cluster")
    output = run_command(*command)
    if output.error:
        raise QueueUnknown(f"{command[0]}: {output.error}; nothing was changed, try again later")
    return output.stdout
