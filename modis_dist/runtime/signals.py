"""Asking a training to stop: by a signal to this process, or by a file that other processes look for.

A handler only sets a flag; the loop saves between steps. The same signal once more ends the process at once, which is
safe: a checkpoint is whole or not there. Another one does not: a queue that wants its machine back sends several kinds.
"""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Flag:
    """A stop port that somebody sets."""

    def __init__(self) -> None:
        self._reason: str | None = None

    def set(self, reason: str) -> None:
        """Ask to stop."""
        self._reason = reason

    def requested(self) -> str | None:
        """Why to stop, or None."""
        return self._reason


class StopFile:
    """A stop port that is a file with the reason; whoever creates it stops every training that looks for it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def requested(self) -> str | None:
        """Why to stop, or None."""
        try:
            return self._path.read_text() or "asked to stop"
        except FileNotFoundError:
            return None


@contextmanager
def on_signal(act: Callable[[str], None]) -> Iterator[None]:
    """Call ``act`` with the signal's name at the first of each kind, and say so; later ones act as they did before.

    Only the main thread of a process may use this. A hang-up is obeyed unless it is ignored already (``nohup``).
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def handle(number: int, _: FrameType | None) -> None:
        signal.signal(number, before[signal.Signals(number)])
        name = signal.Signals(number).name
        act(f"got {name}")
        logging.getLogger(__name__).warning("%s: saving, then stopping; a second one stops at once", name)

    for number in before:
        signal.signal(number, handle)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, before)  # one that was held back is heard here
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
