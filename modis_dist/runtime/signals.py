"""Stop requests for a training: a signal to this process, or a file that other processes poll.

A handler only sets a flag; the loop saves between steps. A second signal of the same kind ends the process at once,
which is safe: checkpoints are written atomically. One of another kind does not: schedulers send several kinds.
"""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Flag:
    """A stop request that is set in this process."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def set(self, reason: str) -> None:
        """Request a stop."""
        self._reason = reason

    def requested(self) -> str | None:
        """Return the reason to stop, or None."""
        return self._reason


class StopFile:
    """A stop request as a file that contains the reason; creating it stops every training that polls it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def requested(self) -> str | None:
        """Return the reason to stop, or None."""
        try:
            return self._path.read_text() or "asked to stop"
        except FileNotFoundError:
            return None


@contextmanager
def on_signal(act: Callable[[str], object]) -> Iterator[None]:
    """Call ``act`` with a reason at the first signal of each kind and log it; later ones act as before the block.

    For the main thread only. SIGHUP is handled unless it is already ignored (``nohup``).
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        name = signal.Signals(number).name
        act(f"got {name}")
        logging.getLogger(__name__).warning("%s: saving, then stopping; a second %s stops immediately", name, name)

    for number in before:
        signal.signal(number, handle)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)  # delivers a deferred signal
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
