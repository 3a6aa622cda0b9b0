"""Lock for a single writer per folder.

The kernel releases the lock (flock) when its process ends, for whatever reason. The content of the lock file only
informs users and ``modis-dist status``, which must not take the lock.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import clear_leftovers
from modis_dist.runtime.processes import running_process

LOCK = "lock"
PATIENCE_S = 60.0  # a worker notices the death of its driver within this time


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, or was killed while holding it."""

    pid: int
    host: str
    started: float  # seconds since 1970

    @property
    def alive(self) -> bool | None:
        """Return whether the process still runs; None if it is on another machine."""
        if self.host != socket.gethostname():
            return None
        return running_process(self.pid, started=self.started) is not None


@contextmanager
def locked(folder: Path, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold a folder's lock; remove the temporary files of killed processes from the folder.

    Raises ``DataError`` if another process holds it for longer than the patience.
    """
    with (folder / LOCK).open("a") as file:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    process = holder(folder)
                    name = f"process {process.pid} on {process.host}" if process else "another process"
                    raise DataError(f"{folder}: {name} is training here; wait for it or stop it") from None
                time.sleep(0.2)
        this_process = Holder(os.getpid(), socket.gethostname(), psutil.Process().create_time())
        _write(file.fileno(), json.dumps(asdict(this_process)))
        clear_leftovers(folder)
        try:
            yield
        finally:
            _write(file.fileno(), "")


def holder(folder: Path) -> Holder | None:
    """Return the process that holds a folder's lock or was killed while holding it, else None. Takes no lock."""
    try:
        content = json.loads((folder / LOCK).read_text())
        return Holder(int(content["pid"]), str(content["host"]), float(content["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: int, text: str) -> None:
    with suppress(OSError):  # a full disk must not release the lock
        os.ftruncate(file, 0)
        os.write(file, text.encode())
