"""How a submission stands: what its folder says of trials, what the queue says of jobs. Changes nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from modis_dist.launch import submission as kept
from modis_dist.launch.job_notes import read_note
from modis_dist.launch.queue import Job, QueueUnknown
from modis_dist.sweep.status import Status, status

State = Literal["waiting", "running", "finished", "stopped", "unknown"]


@dataclass(frozen=True)
class Jobs:
    """One job of a submission, or the tasks of one array."""

    kind: str
    number: str
    states: Mapping[str, int]  # in the queue's words -> how many
    waits_for: str  # the queue's reason, where something waits


@dataclass(frozen=True)
class Standing:
    """A submission at one moment."""

    trials: Status
    form: str
    state: State
    jobs: tuple[Jobs, ...]
    restarts: int  # of all jobs since they were sent
    given_up: Mapping[str, str]  # job -> why it was not queued again
    advice: str


def standing(out: Path) -> Standing:
    """How the submission of an output folder stands.

    A queue that does not answer makes its state unknown, never failed. Raises ``DataError`` where there is none.
    """
    submission, found = kept.load(out), status(out)
    queue = kept.queue_of(kept.site_of(out))
    notes = {p.stem: note for p in sorted((kept.folder_of(out) / kept.STATUS).glob("*.json")) if (note := read_note(p))}
    restarts = sum(note.starts - 1 for note in notes.values())
    given_up = {name: note.reason or "" for name, note in notes.items() if note.state == "given up"}
    try:
        jobs = queue.jobs(submission.numbers)
    except QueueUnknown as error:
        return Standing(found, submission.form, "unknown", (), restarts, given_up, str(error))
    state = _state(found, jobs)
    listed = tuple(_jobs(sent.kind, sent.number, jobs) for sent in submission.latest if sent.number is not None)
    return Standing(found, submission.form, state, listed, restarts, given_up, _advice(out, state, found, submission))


def _state(found: Status, jobs: Mapping[str, Job]) -> State:
    live = [job for job in jobs.values() if job.live]
    if live:
        return "running" if any(job.state != "PENDING" for job in live) else "waiting"
    return "finished" if found.state == "finished" else "stopped"


def _jobs(kind: str, number: str, jobs: Mapping[str, Job]) -> Jobs:
    own = [job for name, job in jobs.items() if name == number or name.startswith(f"{number}_")]
    reasons = dict.fromkeys(job.reason for job in own if job.reason)
    return Jobs(kind, number, dict(Counter(job.state for job in own).most_common()), ", ".join(reasons))


def _advice(out: Path, state: State, found: Status, submission: kept.Submission) -> str:
    here = quote(str(out))
    if not submission.sent:
        return "its submission was refused or cut short; give the same `modis-dist submit` again"
    match state:
        case "running" | "waiting":
            return f"wait; `modis-dist cancel {here}` saves and ends it"
        case "finished" if found.failures:
            return f"{len(found.failures)} trials failed; `modis-dist resume {here}` tries those that crashed again"
        case "finished":
            return f"modis-dist fetch {here} --to DIR"
    return f"no job of it is in the queue; go on with: modis-dist resume {here}"
