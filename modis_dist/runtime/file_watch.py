"""Polling of files that other processes write, in a thread."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

POLL_S = 0.5
CPU_FRACTION = 0.01  # of a core, at most; slow polls are repeated less often


@contextmanager
def watching(poll: Callable[[], None]) -> Iterator[None]:
    """Call ``poll`` repeatedly in a thread during the block, and once more in the calling thread at its end.

    Errors in the thread are ignored, since the next call repeats the work; errors of the last call are raised.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_poll_until, args=(ended, poll), name="watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        poll()


def _poll_until(ended: threading.Event, poll: Callable[[], None]) -> None:
    cpu_s = 0.0
    while not ended.wait(max(POLL_S, cpu_s / CPU_FRACTION)):
        started = time.thread_time()
        with suppress(Exception):  # e.g. a disk that does not respond for a moment
            poll()
        cpu_s = time.thread_time() - started
