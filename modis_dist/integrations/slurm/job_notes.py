"""Status file of a job: state, starts and reason, written atomically and kept when the job is requeued."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from modis_dist.runtime.errors import Interrupted, MachineFailed, RunFailed
from modis_dist.runtime.files import write_json

State = Literal["running", "saved", "done", "failed", "broken", "given up"]
STARTING = ".starting"  # suffix of the file that exists while a job's script runs and its Python has not started
NOT_DONE: frozenset[State] = frozenset({"failed", "broken", "given up"})


class PackFailed(RunFailed):
    """The training of a pack failed and would fail on any machine."""


@dataclass(frozen=True)
class Note:
    """Content of the status file of a job."""

    state: State
    starts: int  # Slurm's restart count is reset when an administrator requeues
    reason: str | None
    job: str
    host: str
    time: float  # seconds since 1970
    code: str  # digest of the source code
    faults: int = 0  # starts that ended by an error of the machine


def read_note(path: Path) -> Note | None:
    """Return the note in a file; None if it is missing or unreadable."""
    try:
        return Note(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def noted(path: Path, *, code: str, requeues: int) -> Iterator[None]:
    """Write the status file at the start and end of the block.

    Raises ``RunFailed`` before the block if the job was requeued more often than allowed; errors of the block are
    written and raised again.
    """
    path.with_suffix(STARTING).unlink(missing_ok=True)
    before = read_note(path)
    job = os.environ.get("SLURM_JOB_ID", "")
    starts, faults = (before.starts, before.faults) if before else (0, 0)
    note = Note("running", 1 + starts, None, job, socket.gethostname(), time.time(), code, faults)
    if note.starts > requeues + 1:
        reason = f"requeued {requeues} times, the limit in the profile (requeues), and not finished"
        _write(path, replace(note, state="given up", reason=reason))
        raise RunFailed(f"{reason}; `modis-dist resume` resumes it from its last checkpoint")
    _write(path, note)
    try:
        yield
    except Interrupted as stopped:
        _write(path, replace(note, state="saved", reason=str(stopped)))
        raise
    except Exception as error:
        state: State = "failed" if isinstance(error, PackFailed) else "broken"
        faults += isinstance(error, MachineFailed)
        _write(path, replace(note, state=state, reason=str(error) or type(error).__name__, faults=faults))
        raise
    _write(path, replace(note, state="done"))


def _write(path: Path, note: Note) -> None:
    write_json(path, asdict(replace(note, time=time.time())))
