"""Processes that must not outlive the one that started them."""

import os
import signal
from multiprocessing import parent_process
from threading import Thread


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
