"""How a submission stands: what its folder says of trials, what the queue says of jobs. Changes nothing."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Literal

from modis_dist.execution.trial import sequence_digest
from modis_dist.integrations.slurm import submission as kept
from modis_dist.integrations.slurm.failure_reasons import how_ended, why_never
from modis_dist.integrations.slurm.job_notes import BEGUN, NOT_DONE, Note, read_note
from modis_dist.integrations.slurm.job_script import LOGS, STATUS
from modis_dist.integrations.slurm.queue import Job, QueueUnknown
from modis_dist.runtime.text import shown
from modis_dist.study.status import Live, Status, status

State = Literal["waiting", "running", "stuck", "finished", "stopped", "unknown"]
LIVE: frozenset[State] = frozenset({"waiting", "running", "stuck"})


@dataclass(frozen=True)
class Jobs:
    """One job of a submission, or the tasks of one array."""

    kind: str
    number: str
    states: Mapping[str, int]  # in the queue's words -> how many
    waits_for: str  # the queue's reason, where something waits


@dataclass(frozen=True)
class Task:
    """What trains a pack of an array."""

    pack: str
    job: str
    state: str  # in the queue's words
    node: str
    restarts: int
    log: str


@dataclass(frozen=True)
class SubmissionStatus:
    """A submission at one moment."""

    study: Status
    form: str
    state: State  # stuck: its jobs wait for what does not come by waiting
    jobs: tuple[Jobs, ...]
    tasks: tuple[Task, ...]  # of packs whose task the queue knows
    restarts: int  # of all jobs since they were sent
    failed: Mapping[str, str]  # job -> why it failed, or was not queued again
    other_program: tuple[str, ...]  # jobs that ran with another text of the program than the one that submitted
    advice: str


def standing(out: Path) -> SubmissionStatus:
    """How the submission of an output folder stands.

    A queue that does not answer makes its state unknown, never failed. Raises ``DataError`` where there is none.
    """
    submission, queue = kept.load(out), kept.queue_of(kept.site_of(out))
    try:  # before the files: a job that ends meanwhile has written all it has to say
        jobs = queue.jobs(submission.numbers)
    except QueueUnknown as error:
        return _unknown(out, submission, str(error))
    own = {name: jobs[number] for name, number in _ids(out, submission).items() if number in jobs}
    found = status(out, live=_live(submission, own))
    notes, logs, state = _notes(out), _logs(out, submission), _state(found, jobs.values())
    ended = {} if state in LIVE else _ended(out, own, notes)
    failed = _with_logs(_failed(notes) | ({} if state in LIVE else _not_begun(out, logs)) | ended, logs)
    return SubmissionStatus(
        study=found,
        form=submission.form,
        state=state,
        jobs=tuple(_jobs(sent.kind, sent.number, jobs) for sent in submission.latest if sent.number is not None),
        tasks=tuple(_tasks(submission, own, notes, logs)),
        restarts=sum(note.starts - 1 for note in notes.values()),
        failed=failed,
        other_program=_of_other_program(submission, notes),
        advice=_advice(out, state, found, submission, failed, list(jobs.values()), _hints(out, own, ended, notes)),
    )


def _unknown(out: Path, submission: kept.Submission, silent: str) -> SubmissionStatus:
    """What is known where the queue does not answer."""
    notes = _notes(out)
    restarts, failed = sum(note.starts - 1 for note in notes.values()), _failed(notes)
    others = _of_other_program(submission, notes)
    failed = _with_logs(failed, _logs(out, submission))
    return SubmissionStatus(status(out), submission.form, "unknown", (), (), restarts, failed, others, silent)


# --- what is known of jobs --------------------------------------------------------------------------------------


def _ids(out: Path, submission: kept.Submission) -> dict[str, str]:
    """The queue's name of every job that was sent last, by the name of its note."""
    local, found = kept.site_of(out).executor == "local", dict[str, str]()
    for sent in submission.latest:
        if sent.kind == "array":
            found |= {
                f"pack-{sent.first + k}": f"{sent.number}" if local else f"{sent.number}_{k}" for k in sent.indices
            }
        else:
            found[sent.kind] = f"{sent.number}"
    return found


def _live(submission: kept.Submission, own: Mapping[str, Job]) -> Live:
    """Whether the job that trains a pack runs: its task; the last job, or the only one, of what is in none."""
    numbers = {sequence_digest(ids): number for number, ids in enumerate(submission.packs)}
    last = "finish" if submission.form == "array" else submission.form

    def live(pack: str) -> bool:
        job = own.get(f"pack-{numbers[pack]}" if pack in numbers else last)
        return job is not None and job.runs

    return live


def _notes(out: Path) -> dict[str, Note]:
    paths = sorted((kept.folder_of(out) / STATUS).glob("*.json"))
    return {path.stem: note for path in paths if (note := read_note(path))}


def _failed(notes: Mapping[str, Note]) -> dict[str, str]:
    return {name: note.reason or "" for name, note in notes.items() if note.state in NOT_DONE}


def _not_begun(out: Path, logs: Mapping[str, Path]) -> dict[str, str]:
    """Jobs that ended before Python began."""
    begun = sorted((kept.folder_of(out) / STATUS).glob(f"*{BEGUN}"))
    return {path.stem: f"ended before Python began: {_last_words(logs.get(path.stem))}" for path in begun}


def _ended(out: Path, own: Mapping[str, Job], notes: Mapping[str, Note]) -> dict[str, str]:
    """Jobs of whose end the queue knows more than they could say themselves."""
    found = {}
    for name, job in own.items():
        note = notes.get(name)
        said = f"{note.reason}; " if note and note.state in NOT_DONE else ""
        if note and note.state == "done":
            continue
        if why := how_ended(job.state):
            found[name] = f"{said}its job ended as {job.state}; {why}"
        elif job.state == "FAILED" and _left_nothing(out, name, note):
            found[name] = "its job ended as FAILED and left no word in this folder"
        elif job.state == "FAILED" and note and note.state == "running":
            found[name] = "its job ended as FAILED, killed before it could say why"
    return found


def _left_nothing(out: Path, name: str, note: Note | None) -> bool:
    return note is None and not (kept.folder_of(out) / STATUS / f"{name}{BEGUN}").exists()


def _hints(out: Path, own: Mapping[str, Job], ended: Mapping[str, str], notes: Mapping[str, Note]) -> list[str]:
    """What to do about how jobs ended, each once."""
    hints = [how_ended(own[name].state) for name in ended]
    if any(own[name].state == "FAILED" and _left_nothing(out, name, notes.get(name)) for name in ended):
        hints.append(f"do nodes see {quote(str(out))}? try `srun ls` of it, or submit to an --out that all nodes see")
    return list(dict.fromkeys(hint for hint in hints if hint))


def _tasks(
    submission: kept.Submission, own: Mapping[str, Job], notes: Mapping[str, Note], logs: Mapping[str, Path]
) -> Iterator[Task]:
    for number, ids in enumerate(submission.packs):
        name = f"pack-{number}"
        if (job := own.get(name)) is not None:
            restarts = notes[name].starts - 1 if name in notes else 0
            yield Task(sequence_digest(ids), job.id, job.state, job.nodes, restarts, str(logs[name]))


def _of_other_program(submission: kept.Submission, notes: Mapping[str, Note]) -> tuple[str, ...]:
    return tuple(name for name, note in notes.items() if note.code != submission.code)


def _with_logs(failed: Mapping[str, str], logs: Mapping[str, Path]) -> dict[str, str]:
    return {name: f"{why} (log: {logs[name]})" if name in logs else why for name, why in failed.items()}


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


def _state(found: Status, jobs: Iterable[Job]) -> State:
    live = [job for job in jobs if job.live]
    if not live:
        return "finished" if found.state == "finished" else "stopped"
    if any(job.runs for job in live):
        return "running"
    never = _never(live)
    return "stuck" if never and all(job in never or job.reason == "Dependency" for job in live) else "waiting"


def _never(jobs: Iterable[Job]) -> list[Job]:
    """The jobs that will not start by themselves."""
    return [job for job in jobs if job.live and not job.runs and why_never(job.state, job.reason)]


def _jobs(kind: str, number: str, jobs: Mapping[str, Job]) -> Jobs:
    own = [job for name, job in jobs.items() if name == number or name.startswith(f"{number}_")]
    reasons = dict.fromkeys(job.reason for job in own if job.reason)
    return Jobs(kind, number, dict(Counter(job.state for job in own).most_common()), ", ".join(reasons))


def _advice(
    out: Path,
    state: State,
    found: Status,
    submission: kept.Submission,
    failed: Mapping[str, str],
    jobs: Sequence[Job],
    hints: Sequence[str],
) -> str:
    here = quote(str(out))
    if not submission.numbers:
        return "its submission was refused or cut short; give the same `modis-dist submit` again"
    never = _of_never(jobs)
    match state:
        case "running" | "waiting":
            return f"{never}wait; `modis-dist cancel {here}` saves and ends it"
        case "stuck":
            return (
                f"{never}where the profile is what you mend: modis-dist cancel {here}, then modis-dist resume {here} "
                "--cluster PROFILE.yaml"
            )
        case "finished" if found.failures:
            return f"{len(found.failures)} trials failed; `modis-dist resume {here}` tries those that crashed again"
        case "finished":
            return f"modis-dist fetch {here} --to DIR"
    if not failed:
        return f"no job of it is in the queue; go on with: modis-dist resume {here}"
    what = f" ({'; '.join(hints)})" if hints else ""
    return (
        f"no job of it is in the queue; mend first what made a job fail{what}, then: modis-dist resume "
        f"{here} (--cluster PROFILE.yaml where the profile is what you mend)"
    )


def _of_never(jobs: Sequence[Job]) -> str:
    """Which jobs never start by themselves, and what to do: each reason with its first job."""
    never = _never(jobs)
    first = {why_never(job.state, job.reason): job.id for job in reversed(never)}
    return (
        f"{len(never)} job(s) will not start: {', '.join(f'{job}: {why}' for why, job in first.items())}; "
        if never
        else ""
    )
