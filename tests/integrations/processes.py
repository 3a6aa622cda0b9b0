"""Waiting for processes, and for what they write."""

import time
from collections.abc import Callable

import psutil


def lives(process: psutil.Process) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], object], *, seconds: float, every_s: float = 0.05) -> bool:
    """Whether a condition holds within some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every_s)
    return False
