"""Callbacks of the training loop, as protocols with implementations that do nothing.

A terminal, the journal, Ray or a test may implement them; the loop does not depend on which.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

EventKind = Literal["start", "end", "figure", "checkpoint"]


class Tracker(Protocol):
    """Receives metrics and events."""

    def metrics(self, trial: str, *, step: int, values: Mapping[str, float]) -> None: ...

    def event(self, trial: str, *, kind: EventKind, values: Mapping[str, Any]) -> None: ...


class Reporter(Protocol):
    """Receives the progress of a training."""

    def progress(self, *, epoch: int, epochs: int, active: int, headline: Mapping[str, float]) -> None: ...


class Stop(Protocol):
    """Asks a training to stop between steps."""

    def requested(self) -> str | None:
        """Return the reason to stop, or None."""
        ...


class NullTracker:
    """A tracker that does nothing."""

    def metrics(self, trial: str, *, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def event(self, trial: str, *, kind: EventKind, values: Mapping[str, Any]) -> None:
        """Do nothing."""


class NullReporter:
    """A reporter that does nothing."""

    def progress(self, *, epoch: int, epochs: int, active: int, headline: Mapping[str, float]) -> None:
        """Do nothing."""


class NeverStop:
    """Never stops a training."""

    def requested(self) -> str | None:
        """Return None."""
        return None


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of one training; by default they do nothing."""

    tracker: Tracker = field(default_factory=NullTracker)
    reporter: Reporter = field(default_factory=NullReporter)
    stop: Stop = field(default_factory=NeverStop)
