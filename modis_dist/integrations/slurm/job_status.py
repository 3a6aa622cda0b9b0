"""Status file of a job: state, starts and reason, written atomically and kept when the job is requeued."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from modis_dist.runtime.errors import DataError, Interrupted, MachineFailed, RunFailed
from modis_dist.runtime.files import write_json
from modis_dist.runtime.text import shown

# pack_failed: would fail on any machine; job_failed: any other error; requeue_limit: requeued too often, not started
State = Literal["running", "saved", "done", "pack_failed", "job_failed", "requeue_limit"]
STARTING = ".starting"  # suffix of the file that exists while a job's script runs and its Python has not started
NOT_DONE: frozenset[State] = frozenset({"pack_failed", "job_failed", "requeue_limit"})


class PackFailed(RunFailed):
    """The training of a pack failed and would fail on any machine."""


@dataclass(frozen=True)
class JobStatus:
    """Content of the status file of a job."""

    state: State
    starts: int  # Slurm's restart count is reset when an administrator requeues
    reason: str | None
    job: str
    host: str
    time: float  # seconds since 1970
    code: str  # digest of the source code
    faults: int = 0  # starts that ended by an error of the machine


def read_job_status(path: Path) -> JobStatus | None:
    """Return the content of a status file; None if it is missing or unreadable.

    Raises ``DataError`` for a state that only another version writes.
    """
    try:
        status = JobStatus(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    if status.state not in get_args(State):
        problem = f"state '{shown(str(status.state))}' is of another version of modis_dist"
        raise DataError(f"{path}: {problem}; continue with that version, or submit to another --out")
    return status


@contextmanager
def record_job_status(path: Path, *, code: str, requeues: int) -> Iterator[None]:
    """Write the status file at the start and end of the block.

    Raises ``RunFailed`` before the block if the job was requeued more often than allowed; errors of the block are
    written and raised again.
    """
    path.with_suffix(STARTING).unlink(missing_ok=True)
    before = read_job_status(path)
    job = os.environ.get("SLURM_JOB_ID", "")
    starts, faults = (before.starts, before.faults) if before else (0, 0)
    status = JobStatus("running", 1 + starts, None, job, socket.gethostname(), time.time(), code, faults)
    if status.starts > requeues + 1:
        reason = f"requeued {requeues} times, the limit in the profile (requeues), and not finished"
        _write(path, replace(status, state="requeue_limit", reason=reason))
        raise RunFailed(f"{reason}; `modis-dist resume` resumes it from its last checkpoint")
    _write(path, status)
    try:
        yield
    except Interrupted as stopped:
        _write(path, replace(status, state="saved", reason=str(stopped)))
        raise
    except Exception as error:
        state: State = "pack_failed" if isinstance(error, PackFailed) else "job_failed"
        faults += isinstance(error, MachineFailed)
        _write(path, replace(status, state=state, reason=str(error) or type(error).__name__, faults=faults))
        raise
    _write(path, replace(status, state="done"))


def _write(path: Path, status: JobStatus) -> None:
    write_json(path, asdict(replace(status, time=time.time())))
