"""What a job says of itself: one small file for each, whole at any moment, that survives being queued again."""

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
BEGUN = ".begun"  # of the file that a job's script leaves until Python has noted its begin
NOT_DONE: frozenset[State] = frozenset({"failed", "broken", "given up"})


class PackFailed(RunFailed):
    """The training of a pack failed, as it would anywhere; what else ends a job is the fault of its surroundings."""


@dataclass(frozen=True)
class Note:
    """The last word of a job."""

    state: State
    starts: int  # counted here: Slurm's own count begins anew where an administrator requeues
    reason: str | None
    job: str
    host: str
    time: float  # seconds since 1970
    code: str  # digest of the program that wrote it
    faults: int = 0  # starts that a machine failed


def read_note(path: Path) -> Note | None:
    """The note in a file; None where there is none that can be read."""
    try:
        return Note(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def noted(path: Path, *, code: str, requeues: int) -> Iterator[None]:
    """Note how the work of the block begins and ends.

    Raises ``RunFailed`` before the block where the work was begun anew more often than allowed; what the block raises
    is noted and passed on.
    """
    path.with_suffix(BEGUN).unlink(missing_ok=True)
    before = read_note(path)
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("SUBMITIT_LOCAL_JOB_ID", "")
    starts, faults = (before.starts, before.faults) if before else (0, 0)
    note = Note("running", 1 + starts, None, job, socket.gethostname(), time.time(), code, faults)
    if note.starts > requeues + 1:
        reason = f"was queued again {requeues} times, as often as the profile's `requeues` allows, and is not done"
        _write(path, replace(note, state="given up", reason=reason))
        raise RunFailed(f"{reason}; `modis-dist resume` sends it again from its last checkpoint")
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
