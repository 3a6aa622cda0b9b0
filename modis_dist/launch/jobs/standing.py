"""How a submission stands: what its folder says of trials, what the queue says of jobs. Changes nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from modis_dist.errors import shown
from modis_dist.launch.jobs import submission as kept
from modis_dist.launch.jobs.notes import BEGUN, NOT_DONE, read_note
from modis_dist.launch.jobs.queue import Job, QueueUnknown
from modis_dist.launch.jobs.script import LOGS, STATUS
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

    study: Status
    form: str
    state: State
    jobs: tuple[Jobs, ...]
    restarts: int  # of all jobs since they were sent
    failed: Mapping[str, str]  # job -> why it failed, or was not queued again
    other_program: tuple[str, ...]  # jobs that ran with another text of the program than the one that submitted
    advice: str


def standing(out: Path) -> Standing:
    """How the submission of an output folder stands.

    A queue that does not answer makes its state unknown, never failed. Raises ``DataError`` where there is none.
    """
    submission, queue = kept.load(out), kept.queue_of(kept.site_of(out))
    try:  # before the files: a job that ends meanwhile has written all it has to say
        jobs = queue.jobs(submission.numbers)
    except QueueUnknown as error:
        jobs, silent = {}, str(error)
    else:
        silent = ""
    live = any(job.live for job in jobs.values())
    found = status(out, live=None if silent else live)
    notes = {p.stem: note for p in sorted((kept.folder_of(out) / STATUS).glob("*.json")) if (note := read_note(p))}
    restarts = sum(note.starts - 1 for note in notes.values())
    logs = _logs(out, submission)
    failed = {name: note.reason or "" for name, note in notes.items() if note.state in NOT_DONE}
    if not live and not silent:
        begun = sorted((kept.folder_of(out) / STATUS).glob(f"*{BEGUN}"))
        failed |= {path.stem: f"ended before Python began: {_last_words(logs.get(path.stem))}" for path in begun}
    failed = {name: f"{why} (log: {logs[name]})" if name in logs else why for name, why in failed.items()}
    others = tuple(name for name, note in notes.items() if note.code != submission.code)
    if silent:
        return Standing(found, submission.form, "unknown", (), restarts, failed, others, silent)
    state = _state(found, jobs)
    listed = tuple(_jobs(sent.kind, sent.number, jobs) for sent in submission.latest if sent.number is not None)
    advice = _advice(out, state, found, submission, failed)
    return Standing(found, submission.form, state, listed, restarts, failed, others, advice)


def _logs(out: Path, submission: kept.Submission) -> dict[str, Path]:
    """The log of every job that was sent last, by the name of its note."""
    folder, found = kept.folder_of(out) / LOGS, dict[str, Path]()
    local = kept.site_of(out).executor == "local"
    for sent in submission.latest:
        stem = sent.mark if local else sent.number
        if sent.kind == "array":
            found |= {f"pack-{sent.first + index}": folder / f"{stem}_{index}.log" for index in sent.indices}
        else:
            found[sent.kind] = folder / f"{stem}.log"
    return found


def _last_words(log: Path | None) -> str:
    """The last line that a job printed."""
    try:
        lines = log.read_text(errors="replace").split("\n") if log is not None else []
    except OSError:
        lines = []
    return shown(next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing"))


def _state(found: Status, jobs: Mapping[str, Job]) -> State:
    live = [job for job in jobs.values() if job.live]
    if live:
        return "running" if any(job.state != "PENDING" for job in live) else "waiting"
    return "finished" if found.state == "finished" else "stopped"


def _jobs(kind: str, number: str, jobs: Mapping[str, Job]) -> Jobs:
    own = [job for name, job in jobs.items() if name == number or name.startswith(f"{number}_")]
    reasons = dict.fromkeys(job.reason for job in own if job.reason)
    return Jobs(kind, number, dict(Counter(job.state for job in own).most_common()), ", ".join(reasons))


def _advice(out: Path, state: State, found: Status, submission: kept.Submission, failed: Mapping[str, str]) -> str:
    here = quote(str(out))
    if not submission.numbers:
        return "its submission was refused or cut short; give the same `modis-dist submit` again"
    match state:
        case "running" | "waiting":
            return f"wait; `modis-dist cancel {here}` saves and ends it"
        case "finished" if found.failures:
            return f"{len(found.failures)} trials failed; `modis-dist resume {here}` tries those that crashed again"
        case "finished":
            return f"modis-dist fetch {here} --to DIR"
    if not failed:
        return f"no job of it is in the queue; go on with: modis-dist resume {here}"
    return (
        "no job of it is in the queue; mend first what made a job fail, then: modis-dist resume "
        f"{here} (--cluster PROFILE.yaml where the profile is what you mend)"
    )
