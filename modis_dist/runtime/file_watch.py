"""Looking at what other processes write, again and again, beside what this one does."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SECONDS_BETWEEN_LOOKS = 0.5
SHARE = 0.01  # of a core, at most, for looking: where a look takes long, less often


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Call ``look`` in a thread while the ``with`` block runs, and once more, in this thread, when it is left.

    What goes wrong in the thread is tried again; only what the last look raises is raised.
    """
    over = threading.Event()
    thread = threading.Thread(target=_look_until, args=(over, look), name="watching", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


def _look_until(over: threading.Event, look: Callable[[], None]) -> None:
    spent = 0.0
    while not over.wait(max(SECONDS_BETWEEN_LOOKS, spent / SHARE)):
        began = time.thread_time()
        with suppress(Exception):  # a disk that does not answer for a moment
            look()
        spent = time.thread_time() - began
