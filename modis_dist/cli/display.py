"""Progress on a terminal; nothing where standard error is not one."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MINUTE_S, HOUR_S, DAY_S = 60, 3600, 86400
FIGURES = {"val/balanced_accuracy": "balanced accuracy", "train/total_g": "loss"}


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 2 * MINUTE_S:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 2 * HOUR_S:
        return f"{seconds / MINUTE_S:.0f} min"
    return f"{seconds / HOUR_S:.1f} h" if seconds < 2 * DAY_S else f"{seconds / DAY_S:,.0f} days"


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    return f"{count / unit:,.1f} {name}" if count < 10 * unit else f"{count / unit:,.0f} {name}"


def errors() -> Console:
    """Where progress and notices go."""
    return Console(file=cast(TextIO, _StandardError()), soft_wrap=True, highlight=False)


class _StandardError:
    """Standard error that never fails: a terminal that went away is no reason to end a training."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> int:
        """As of a text stream."""
        with suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """As of a text stream."""
        with suppress(OSError):
            sys.stderr.flush()


@contextmanager
def sweep_bars() -> Iterator["SweepBars"]:
    """A bar for each stage of a study."""
    with _bars() as bars:
        yield SweepBars(bars)


@contextmanager
def run_bar(epochs: int) -> Iterator["RunBar"]:
    """A bar for one training."""
    with _bars() as bars:
        yield RunBar(bars, epochs)


@contextmanager
def rows_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar for rows going through a model; call it with the rows done and the rows in all."""
    with _bars() as bars:
        task = bars.add_task("rows", total=None, said="")

        def told(done: int, rows: int) -> None:
            bars.update(task, completed=done, total=rows, said=f"{done} of {rows}")

        yield told


@contextmanager
def modality_bars() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each modality; call it with the modality, what is done of it and what there is."""
    with _bars() as bars:
        tasks: dict[str, TaskID] = {}

        def told(modality: str, done: int, total: int) -> None:
            if modality not in tasks:
                tasks[modality] = bars.add_task(modality, said="")
            bars.update(tasks[modality], completed=done, total=total)

        yield told


def _bars() -> Progress:
    console = errors()
    return Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class SweepBars:
    """The display of a study."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._trials = 0

    def stage(self, name: str, *, trials: int, epochs: int) -> None:
        """Begin a bar."""
        self._trials = trials
        self._task = self._bars.add_task(name, total=epochs, said="starting")

    def update(self, *, epochs: int, done: int, failed: int) -> None:
        """Move it."""
        said = f"{done} of {self._trials} trials" + (f", {failed} failed" if failed else "")
        self._bars.update(self._task, completed=epochs, said=said)


class RunBar:
    """The reporter of one training."""

    def __init__(self, bars: Progress, epochs: int) -> None:
        self._bars = bars
        self._task = bars.add_task("training", total=epochs, said="starting")

    def progress(self, *, epoch: int, epochs: int, active: int, headline: Mapping[str, float]) -> None:
        """Move it, with the figures worth a look."""
        del active
        said = ", ".join(f"{name} {headline[key]:.3f}" for key, name in FIGURES.items() if key in headline)
        self._bars.update(self._task, total=epochs, completed=epoch, said=said)
