"""Waiting for processes and for their files."""

import time
from collections.abc import Callable

import psutil


def is_running(process: psutil.Process) -> bool:
    """Return True if a process runs; a zombie does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], object], *, seconds: float, every_s: float = 0.05) -> bool:
    """Wait for a condition; return False if it does not hold in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every_s)
    return False
