"""Polling of files that other processes write, in a thread."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

POLL_S = 0.5
CPU_SHARE = 0.01  # of a core, at most: slow looks are made less often


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Call ``look`` again and again in a thread during the block, and once more in this thread at its end.

    Errors in the thread are ignored, since the next look repeats the work; those of the last look are raised.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_look_until, args=(ended, look), name="watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        look()


def _look_until(ended: threading.Event, look: Callable[[], None]) -> None:
    cpu_s = 0.0
    while not ended.wait(max(POLL_S, cpu_s / CPU_SHARE)):
        started = time.thread_time()
        with suppress(Exception):  # as from a disk that does not answer for a moment
            look()
        cpu_s = time.thread_time() - started
