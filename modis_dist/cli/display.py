"""Progress bars on standard error, if it is a terminal."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400
METRICS = {"val/balanced_accuracy": "balanced accuracy", "train/total_g": "loss"}


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit."""
    if seconds < 2 * MINUTE_S:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    return f"{seconds / HOUR_S:.1f} h" if seconds < 2 * DAY_S else f"{seconds / DAY_S:,.0f} days"


def size(count: int) -> str:
    """Format a number of bytes in a suitable unit."""
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    return f"{count / unit:,.1f} {name}" if count < 10 * unit else f"{count / unit:,.0f} {name}"


def errors() -> Console:
    """Return the console for progress and notices: standard error."""
    return Console(file=cast(TextIO, _StandardError()), soft_wrap=True, highlight=False)


class _StandardError:
    """Standard error whose write errors are ignored: a closed terminal must not end a training."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


@contextmanager
def named_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar per name; yield a callback that takes a name, the amount done and the total."""
    with progress_bars() as bars:
        tasks: dict[str, TaskID] = {}

        def update(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, status="")
            bars.update(tasks[name], completed=done, total=total)

        yield update


def progress_bars() -> Progress:
    """Return progress bars for standard error, to be used in a ``with`` block."""
    console = errors()
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[status]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class SweepBars:
    """Progress of a study, with one bar per stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._trials = 0

    def stage(self, name: str, *, trials: int, epochs: int) -> None:
        """Start a bar."""
        self._trials = trials
        self._task = self._bars.add_task(name, total=epochs, status="starting")

    def update(self, *, epochs: int, done: int, failed: int) -> None:
        """Update the bar."""
        status = f"{done} of {self._trials} trials" + (f", {failed} failed" if failed else "")
        self._bars.update(self._task, completed=epochs, status=status)


class RunBar:
    """Progress reporter of one training."""

    def __init__(self, bars: Progress, epochs: int) -> None:
        self._bars = bars
        self._task = bars.add_task("training", total=epochs, status="starting")

    def progress(self, *, epoch: int, epochs: int, active: int, headline: Mapping[str, float]) -> None:
        """Update the bar and its metrics."""
        del active
        status = ", ".join(f"{name} {headline[key]:.3f}" for key, name in METRICS.items() if key in headline)
        self._bars.update(self._task, total=epochs, completed=epoch, status=status)
