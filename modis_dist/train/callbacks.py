"""What the training loop needs from the world, as protocols with versions that do nothing.

The loop never knows whether a terminal, a journal, Ray or a test stands behind them.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

EventKind = Literal["start", "end", "figure", "checkpoint"]


class Tracker(Protocol):
    """Where figures of a training go."""

    def metrics(self, trial: str, *, step: int, values: Mapping[str, float]) -> None: ...

    def event(self, trial: str, *, kind: EventKind, values: Mapping[str, Any]) -> None: ...


class Reporter(Protocol):
    """Who is told how far a training is."""

    def progress(self, *, epoch: int, epochs: int, active: int, headline: Mapping[str, float]) -> None: ...


class Stop(Protocol):
    """Who may ask a training to stop between steps."""

    def requested(self) -> str | None:
        """Why to stop, or None."""
        ...


class NullTracker:
    """Keeps nothing."""

    def metrics(self, trial: str, *, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def event(self, trial: str, *, kind: EventKind, values: Mapping[str, Any]) -> None:
        """Nothing."""


class NullReporter:
    """Tells nobody."""

    def progress(self, *, epoch: int, epochs: int, active: int, headline: Mapping[str, float]) -> None:
        """Nothing."""


class NeverStop:
    """Never asks to stop."""

    def requested(self) -> str | None:
        """None."""
        return None
