"""Child processes: started with signals blocked, killed when the parent exits; and lookup of running processes."""

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from threading import Thread

import psutil

CLOCK_S = 1.0  # tolerance: start times are relative to a boot time that may be corrected


def running_process(pid: int, *, started: float) -> psutil.Process | None:
    """Return the process of this machine with a pid and a start time (seconds since 1970); None if it has ended.

    The start time is needed because pids are reused.
    """
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) <= CLOCK_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


@contextmanager
def signals_blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Start processes in the block with these signals blocked until they unblock them.

    Terminals and schedulers signal whole process groups, and a Python that is still starting would print a traceback.
    """
    resource_tracker.ensure_running()  # otherwise the first start does so and unblocks the signals of this thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def defer_signal(number: signal.Signals) -> None:
    """Keep a signal pending, also one that was ignored, until ``on_signal`` handles it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    signal.signal(number, lambda *_: None)  # an ignored signal would not stay pending


def end_with_parent() -> None:
    """Kill this process, started by ``multiprocessing``, as soon as its parent ends, for whatever reason.

    The parent holds one end of a pipe, which the system closes. Unlike ``PR_SET_PDEATHSIG`` of Linux this works
    everywhere and does not depend on which thread of the parent started the process.
    """
    parent = parent_process()
    assert parent is not None, "only processes of multiprocessing know their parent"

    def wait_for_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=wait_for_parent, name="end with parent", daemon=True).start()
