"""One writer per folder, and who that is.

The lock is the kernel's: it ends with its process, whatever ends that. What stands in the file is for people and for
``modis-dist status``, which must not take the lock to see whether it is held.
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

LOCK = "lock"
PATIENCE_S = 60.0  # a worker that outlived its killed driver notices within this time
CLOCK_S = 1.0  # processes tell their start in hundredths of a second after a boot time that may be corrected


@dataclass(frozen=True)
class Holder:
    """The process that wrote itself into a lock file, and did not leave in order yet."""

    pid: int
    host: str
    started: float  # seconds since 1970: a process number is used again, with another start

    @property
    def alive(self) -> bool | None:
        """Whether the process still runs; None where it is on another machine."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.pid)
            ended = process.status() == psutil.STATUS_ZOMBIE
            return not ended and abs(process.create_time() - self.started) < CLOCK_S
        except psutil.Error:
            return False


@contextmanager
def locked(folder: Path, *, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold a folder's lock, and clear the folder of what killed processes left.

    Raises ``DataError`` where another process keeps it for longer than the patience.
    """
    with (folder / LOCK).open("a") as file:
        end = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise DataError(f"{folder}: {_who(folder)} is training here; wait for it or stop it") from None
                time.sleep(0.2)
        me = Holder(os.getpid(), socket.gethostname(), psutil.Process().create_time())
        _write(file.fileno(), json.dumps(asdict(me)))
        clear_leftovers(folder)
        try:
            yield
        finally:
            _write(file.fileno(), "")


def holder(folder: Path) -> Holder | None:
    """Who has a folder's lock or was killed with it; None after an orderly end. Takes nothing, writes nothing."""
    try:
        content = json.loads((folder / LOCK).read_text())
        return Holder(int(content["pid"]), str(content["host"]), float(content["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(file: int, text: str) -> None:
    with suppress(OSError):  # a full disk; the lock is held all the same
        os.ftruncate(file, 0)
        os.write(file, text.encode())


def _who(folder: Path) -> str:
    found = holder(folder)
    return "another process" if found is None else f"process {found.pid} on {found.host}"
