"""Status of a submission: trials from its folder, jobs from the queue. Changes nothing."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from modis_dist.execution.trial import sequence_digest
from modis_dist.integrations.slurm.failure_reasons import FIXES, why_never
from modis_dist.integrations.slurm.folder import folder_of
from modis_dist.integrations.slurm.job_script import LOGS, STATUS
from modis_dist.integrations.slurm.job_status import NOT_DONE, STARTING, JobStatus, read_job_status
from modis_dist.integrations.slurm.queue import Job, QueueUnknown
from modis_dist.integrations.slurm.submission import Submission, load, queue_of, site_of
from modis_dist.runtime.text import shown
from modis_dist.study.status import Status, status

State = Literal["waiting", "running", "stuck", "finished", "stopped", "unknown"]
LIVE: frozenset[State] = frozenset({"waiting", "running", "stuck"})


@dataclass(frozen=True)
class QueuedJob:
    """States of one job of a submission, or of the tasks of one array."""

    kind: str
    number: str
    states: Mapping[str, int]  # Slurm's state -> number of jobs
    reason: str  # Slurm's reasons for pending


@dataclass(frozen=True)
class Task:
    """The task of an array that trains a pack."""

    pack: str
    job: str
    state: str  # Slurm's word
    node: str
    restarts: int
    log: str


@dataclass(frozen=True)
class SubmissionStatus:
    """A submission at one moment."""

    study: Status
    form: str
    state: State  # stuck: no job will start without a change; unknown: the queue does not answer
    jobs: tuple[QueuedJob, ...]
    tasks: tuple[Task, ...]  # those that the queue lists
    restarts: int  # of all jobs since they were sent
    failed: Mapping[str, str]  # job -> why it failed, or was not requeued
    other_code: tuple[str, ...]  # jobs that ran other source code than the submitting one
    advice: str


def submission_status(out: Path) -> SubmissionStatus:
    """Return the status of the submission of an output folder. Raises ``DataError`` if there is none."""
    submission, jobs, queue_error = load(out), dict[str, Job](), ""
    try:  # before the files are read: a job that ends meanwhile has written everything
        jobs = queue_of(site_of(out)).jobs(submission.numbers)
    except QueueUnknown as error:
        queue_error = str(error)
    view = _JobView(out, submission, jobs)
    study = status(out) if queue_error else status(out, live=view.trains)
    state: State = "unknown" if queue_error else _state(study, list(jobs.values()))
    failed = dict(view.failed()) | ({} if queue_error or state in LIVE else view.ended())
    return SubmissionStatus(
        study=study,
        form=submission.form,
        state=state,
        jobs=() if queue_error else tuple(view.states()),
        tasks=tuple(view.tasks()),
        restarts=sum(job_status.starts - 1 for job_status in view.job_statuses.values()),
        failed={
            name: f"{reason} (log: {view.logs[name]})" if name in view.logs else reason
            for name, reason in failed.items()
        },
        other_code=tuple(name for name, job_status in view.job_statuses.items() if job_status.code != submission.code),
        advice=queue_error or _advice(view, state, study, failed),
    )


class _JobView:
    """Jobs of the last submit or resume in queue and folder, by the name of their status files."""

    def __init__(self, out: Path, submission: Submission, jobs: Mapping[str, Job]) -> None:
        self.out, self.submission, self.all = out, submission, jobs
        self._folder = folder_of(out) / STATUS
        job_statuses = ((path.stem, read_job_status(path)) for path in sorted(self._folder.glob("*.json")))
        self.job_statuses: dict[str, JobStatus] = {name: job_status for name, job_status in job_statuses if job_status}
        ids: dict[str, str] = {}
        self.logs: dict[str, Path] = {}
        local = site_of(out).executor == "local"
        for sent in submission.latest:
            stem = sent.mark if local else sent.number
            for index in sent.indices if sent.kind == "array" else [None]:
                name, suffix = (sent.kind, "") if index is None else (f"pack-{sent.first + index}", f"_{index}")
                ids[name] = f"{sent.number}{'' if local else suffix}"
                self.logs[name] = folder_of(out) / LOGS / f"{stem}{suffix}.log"
        self.jobs = {name: jobs[number] for name, number in ids.items() if number in jobs}
        self._packs = {sequence_digest(ids): f"pack-{number}" for number, ids in enumerate(submission.packs)}

    def trains(self, pack: str) -> bool:
        """Return whether the job of a pack runs: its task, or the last job for packs without a task."""
        last = "finish" if self.submission.form == "array" else self.submission.form
        job = self.jobs.get(self._packs.get(pack, last))
        return job is not None and job.runs

    def states(self) -> Iterator[QueuedJob]:
        """Yield the states of every job of the last submit or resume."""
        for sent in self.submission.latest:
            if sent.number is not None:
                jobs = [job for name, job in self.all.items() if name.partition("_")[0] == sent.number]
                reasons = dict.fromkeys(job.reason for job in jobs if job.reason)
                states = dict(Counter(job.state for job in jobs).most_common())
                yield QueuedJob(sent.kind, sent.number, states, ", ".join(reasons))

    def tasks(self) -> Iterator[Task]:
        """Yield the tasks that the queue lists, by pack."""
        for pack, name in self._packs.items():
            if (job := self.jobs.get(name)) is not None:
                restarts = self.job_statuses[name].starts - 1 if name in self.job_statuses else 0
                yield Task(pack, job.id, job.state, job.nodes, restarts, str(self.logs[name]))

    def failed(self) -> Iterator[tuple[str, str]]:
        """Yield the reasons that jobs wrote."""
        for name, job_status in self.job_statuses.items():
            if job_status.state in NOT_DONE:
                yield name, job_status.reason or ""

    def ended(self) -> dict[str, str]:
        """Return the reasons jobs ended, for jobs that wrote none or whose end the queue explains better."""
        unstarted = sorted(path.stem for path in self._folder.glob(f"*{STARTING}"))
        reasons = {name: f"ended before Python started: {_last_line(self.logs.get(name))}" for name in unstarted}
        for name, job in self.jobs.items():
            job_status = self.job_statuses.get(name)
            wrote = f"{job_status.reason}; " if job_status and job_status.state in NOT_DONE else ""
            if job_status and job_status.state == "done":
                continue
            if fix := FIXES.get(job.state):
                reasons[name] = f"{wrote}job {job.state}; {fix}"
            elif self.left_no_trace(name):
                reasons[name] = "job FAILED without writing a status file"
            elif job.state == "FAILED" and job_status and job_status.state == "running":
                reasons[name] = "job FAILED, killed before it could write a reason"
        return reasons

    def left_no_trace(self, name: str) -> bool:
        """Return whether a job failed without a trace in the folder."""
        return (
            self.jobs[name].state == "FAILED"
            and name not in self.job_statuses
            and not (self._folder / f"{name}{STARTING}").exists()
        )

    def fixes(self) -> str:
        """Return the fixes for the ways jobs ended, each once."""
        ended = [name for name in self.jobs if name not in self.job_statuses or self.job_statuses[name].state != "done"]
        fixes = [FIXES.get(self.jobs[name].state) for name in ended]
        if any(map(self.left_no_trace, ended)):
            fixes.append(
                f"check that the nodes see {quote(str(self.out))} (`srun ls`), or submit to an --out on a file "
                "system that all nodes share"
            )
        return "; ".join(dict.fromkeys(fix for fix in fixes if fix))


def _last_line(log: Path | None) -> str:
    try:
        lines = log.read_text(errors="replace").split("\n") if log is not None else []
    except OSError:
        lines = []
    return shown(next((line.strip() for line in reversed(lines) if line.strip()), "no output"))


def _state(study: Status, jobs: Iterable[Job]) -> State:
    live = [job for job in jobs if job.live]
    if not live:
        return "finished" if study.state == "finished" else "stopped"
    if any(job.runs for job in live):
        return "running"
    blocked = _blocked(live)
    return "stuck" if blocked and all(job in blocked or job.reason == "Dependency" for job in live) else "waiting"


def _blocked(jobs: Iterable[Job]) -> list[Job]:
    """Return the pending jobs that will not start without a change."""
    return [job for job in jobs if job.live and not job.runs and why_never(job.state, job.reason)]


def _advice(view: _JobView, state: State, study: Status, failed: Mapping[str, str]) -> str:
    folder = quote(str(view.out))
    if not view.submission.numbers:
        return "the submission was refused or interrupted; run the same `modis-dist submit` again"
    match state:
        case "running" | "waiting":
            return f"{_why_blocked(view)}wait; `modis-dist cancel {folder}` saves checkpoints and cancels the jobs"
        case "stuck":
            return (
                f"{_why_blocked(view)}to change the profile: modis-dist cancel {folder}, then modis-dist resume "
                f"{folder} --cluster PROFILE.yaml"
            )
        case "finished" if study.failures:
            return f"{len(study.failures)} trial(s) failed; `modis-dist resume {folder}` retries those that crashed"
        case "finished":
            return f"modis-dist fetch {folder} --to DIR"
    if not failed:
        return f"no job is in the queue; continue with: modis-dist resume {folder}"
    fixes = f" ({what})" if (what := view.fixes()) else ""
    return (
        f"no job is in the queue; fix what made a job fail{fixes}, then: modis-dist resume {folder} (with --cluster "
        "PROFILE.yaml to change the profile)"
    )


def _why_blocked(view: _JobView) -> str:
    """Return the jobs that will not start and the fix: each reason with its first job; empty if there are none."""
    blocked = _blocked(view.all.values())
    reasons = {why_never(job.state, job.reason): job.id for job in reversed(blocked)}
    listed = ", ".join(f"{job}: {reason}" for reason, job in reasons.items())
    return f"{len(blocked)} job(s) will not start: {listed}; " if blocked else ""
