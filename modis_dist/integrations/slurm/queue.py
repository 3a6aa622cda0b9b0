"""Slurm's commands, through submitit: submitting, asking, cancelling, queueing again.

Nothing is pickled: jobs are scripts of ours. What submitit thinks of a job is not asked for, as it takes one that waits
to run again for finished; squeue and sacct are.
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

from submitit import SlurmExecutor, SlurmJob
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmInfoWatcher

from modis_dist.integrations.slurm.slurm_commands import ask, one_line, without_defaults
from modis_dist.runtime.errors import RunFailed, UserError

SPARE = 2  # nodes of a partition that a job may have to avoid
LATE_S = 10.0  # for a job to show up that was accepted although sbatch failed
LIVE = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING", "SIGNALING"})
LIVE_PREFIXES = ("REQUEUE_", "SPECIAL_", "STAGE_", "STOPPED")
WAITING, WAITING_PREFIXES = frozenset({"PENDING", "REQUEUED"}), ("REQUEUE_", "SPECIAL_")
PROGRAMS = ("sbatch", "squeue", "scancel", "scontrol", "srun")
SLOW = re.compile(
    r"timed out|time-?out|contact|connect|communicat|zero bytes", re.IGNORECASE
)  # it may have accepted all the same


class QueueUnknown(RunFailed):
    """Slurm does not answer: nothing is known, and nothing was changed."""


class NotSeen(UserError):
    """sbatch failed in a way in which it may have accepted the job, which is not in the queue; it may come yet."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as Slurm tells of it."""

    id: str  # 123, or 123_4
    state: str  # in Slurm's words
    reason: str = ""  # why it waits
    nodes: str = ""

    @property
    def live(self) -> bool:
        """Whether it waits, runs, or will run again."""
        return self.state in LIVE or self.state.startswith(LIVE_PREFIXES)

    @property
    def runs(self) -> bool:
        """Whether it has nodes now."""
        return self.live and self.state not in WAITING and not self.state.startswith(WAITING_PREFIXES)


class _Script(SlurmExecutor):  # type: ignore[misc]
    """submitit's way to sbatch, for a script that is written already."""

    def __init__(self, folder: Path, options: Sequence[str]) -> None:
        super().__init__(folder=folder)
        self._options = list(options)

    def submitted(self, text: str) -> str:
        """The job's number. Raises what submitit raises."""
        job: SlurmJob[None] = self._submit_command(text)
        return str(job.job_id)

    def _make_submission_file_text(self, command: str, uid: str) -> str:  # noqa: ARG002
        return command

    def _make_submission_command(self, submission_file_path: Path) -> list[str]:
        return ["sbatch", *self._options, str(submission_file_path)]


class Queue(Protocol):
    """Who runs jobs. Nothing of it is believed about what a training has reached: files say that."""

    def submit(self, text: str, *, folder: Path, mark: str, tasks: Sequence[int], after: Sequence[str]) -> str:
        """Submit a script, to be run in a folder once other jobs have ended; returns the job's number."""
        ...

    def marked(self, mark: str) -> str | None:
        """The number of one's own job with a mark; None where there is none."""
        ...

    def jobs(self, numbers: Sequence[str]) -> dict[str, Job]:
        """The jobs of some numbers, tasks of arrays each by itself, by id."""
        ...

    def cancel(self, numbers: Sequence[str]) -> None:
        """Cancel jobs, whatever they are doing; those that have ended are no error."""
        ...


class SlurmQueue:
    """Slurm. Methods raise ``QueueUnknown`` where it does not answer."""

    def submit(self, text: str, *, folder: Path, mark: str, tasks: Sequence[int], after: Sequence[str]) -> str:  # noqa: ARG002
        """See ``Queue.submit``; the tasks stand in the script. The mark is the job's comment.

        By it a job is found that was accepted although sbatch did not live to say so. Raises ``UserError`` with Slurm's
        own line where it refuses.
        """
        _installed()
        options = [f"--chdir={folder}", f"--comment={mark}"]
        if after:
            options += [f"--dependency=afterany:{':'.join(after)}"]
        quiet = StringIO()  # submitit prints what it raises too
        try:
            with redirect_stderr(quiet), without_defaults():
                return _Script(folder / "scripts", options).submitted(text)
        except FailedJobError as error:
            refused = one_line(str(error), "sbatch")
            if not SLOW.search(refused):
                raise UserError(f"sbatch: {refused}") from None
        except FailedSubmissionError as error:  # sbatch was content, and said no number that can be read
            refused = one_line(str(error), "sbatch")
        return self._late(mark, refused)

    def _late(self, mark: str, said: str) -> str:
        """The number of a job that was accepted although sbatch did not say so.

        Raises ``NotSeen`` where squeue does not know it, ``QueueUnknown`` where that does not answer either.
        """
        end, answered = time.monotonic() + LATE_S, False
        while time.monotonic() < end:
            time.sleep(1)
            with suppress(QueueUnknown):
                if (found := self.marked(mark)) is not None:
                    return found
                answered = True
        if not answered:
            raise QueueUnknown(f"sbatch: {said}; whether this job was submitted is not known, try again later")
        raise NotSeen(f"sbatch: {said}")

    def marked(self, mark: str) -> str | None:
        """See ``Queue.marked``."""
        told = _asked("squeue", "-h", "-u", str(os.getuid()), "-o", "%F|%k")
        lines = (line.split("|", 1) for line in told.splitlines())
        return next((number for number, comment in lines if comment == mark), None)

    def jobs(self, numbers: Sequence[str]) -> dict[str, Job]:
        """See ``Queue.jobs``. What squeue knows is; of what it forgot, sacct knows the end, where accounting is on.

        What sacct still takes for live and squeue does not know is not: accounting lags behind, or has lost the end.
        """
        wanted = set(numbers)
        if not wanted:
            return {}
        found = {job.id: job for job in _ended(numbers)}
        for line in _asked("squeue", "-h", "-r", "-u", str(os.getuid()), "-o", "%i|%T|%r|%N").splitlines():
            name, state, reason, nodes = line.split("|", 3)
            if name.partition("_")[0] in wanted:
                waits = reason if state != "RUNNING" and reason != "None" else ""
                found[name] = Job(name, state, waits, nodes)
        arrays = {name.partition("_")[0] for name in found if "_" in name}
        return {name: job for name, job in found.items() if name not in arrays}  # sacct shows a young array as one job

    def cancel(self, numbers: Sequence[str]) -> None:
        """See ``Queue.cancel``."""
        if numbers:
            _asked("scancel", *numbers)


def _ended(numbers: Sequence[str]) -> list[Job]:
    command = ["sacct", "-X", "--parsable2", "-o", "JobID,State,NodeList", "-j", ",".join(numbers)]
    try:
        told = SlurmInfoWatcher().read_info(_asked(*command))
    except QueueUnknown:
        return []  # a cluster without accounting: squeue alone knows
    known = [Job(name, one["State"].partition(" ")[0], "", one["NodeList"]) for name, one in told.items()]
    return [job for job in known if not job.live]


def requeue(*, without: str | None = None) -> bool:
    """Have the job that this process is in queued again, where Slurm has not decided about it already.

    Of one that was cancelled, or is queued again by others, nothing is asked; of one that is ended at its time limit it
    still is, should the warning before have been missed. ``without`` is a node that it is not to come back to, where
    its partition has others. Returns whether it was asked.
    """
    number = _own_number()
    told = _asked("squeue", "-h", "-j", number, "-o", "%T|%r|%D|%P|%x").strip()
    state, reason, nodes, partition, excluded = (told.split("|") + [""] * 4)[:5]
    if state != "RUNNING" and reason != "TimeLimit":
        return False
    others = without is not None and _spares(partition, nodes)
    _asked("scontrol", "requeue", number)
    if others:  # Slurm takes it of jobs that wait only
        avoided = ",".join(filter(None, [excluded, without]))
        with suppress(QueueUnknown):  # where it is not allowed, the job may come back there
            _asked("scontrol", "update", f"JobId={number}", f"ExcNodeList={avoided}")
    return True


def _spares(partition: str, nodes: str) -> bool:
    """Whether a partition has some nodes more than a job takes: one that avoids too many would wait for ever."""
    with suppress(QueueUnknown, ValueError):
        return sum(map(int, _asked("sinfo", "-h", "-p", partition, "-o", "%D").split())) >= int(nodes) + SPARE
    return False


def _own_number() -> str:
    """The number of this job. A task goes by its array's, for one of the tasks has the number of the whole array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def _installed() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise UserError(
            f"{missing[0]} is not on this machine: submit from a login node of the cluster, or say --cluster "
            "cluster/local.yaml to run the same jobs here"
        )


def _asked(*command: str) -> str:
    """What one of Slurm's commands prints. Raises ``QueueUnknown`` where it fails."""
    if shutil.which(command[0]) is None:
        raise QueueUnknown(f"{command[0]} is not on this machine; ask on a login node of the cluster")
    told = ask(*command)
    if told.error:
        raise QueueUnknown(f"{command[0]}: {told.error}; nothing was changed, try again later")
    return told.text
