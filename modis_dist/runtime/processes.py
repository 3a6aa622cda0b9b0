"""Processes of ours: how they start without hearing of signals, and that they do not outlive who started them."""

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from threading import Thread


@contextmanager
def signals_blocked(signals: Collection[signal.Signals]) -> Iterator[None]:
    """Processes that are started in the block get no such signal before they say so.

    Terminals and queues signal whole groups, and a Python that is just starting prints what it thinks of it.
    """
    resource_tracker.ensure_running()  # or the first start would, and make this thread hear again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def defer_signal(number: signal.Signals) -> None:
    """Keep a signal, also one that is ignored until now, for the first who listens with ``on_signal``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    signal.signal(number, lambda *_: None)  # what is ignored is not kept


def end_with_parent() -> None:
    """In a process that ``multiprocessing`` has started: be killed as soon as its parent is gone, however that ended.

    The parent holds one end of a pipe, which the system closes; unlike a signal asked of Linux this works everywhere
    and does not depend on which thread of the parent started the process.
    """
    Thread(target=_killed_after_parent, name="end with parent", daemon=True).start()


def _killed_after_parent() -> None:
    parent = parent_process()
    assert parent is not None, "only a process of multiprocessing knows its parent"
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
