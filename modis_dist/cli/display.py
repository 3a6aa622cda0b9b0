"""Progress on a terminal; nothing where standard error is not one."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def errors() -> Console:
    """Where progress and notices go."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def _bar(console: Console) -> Progress:
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


class SweepBar(AbstractContextManager["SweepBar"]):
    """A bar for each stage of a study."""

    def __init__(self) -> None:
        self._console = errors()
        self._bar = _bar(self._console)
        self._trials = 0

    def __enter__(self) -> "SweepBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, name: str, *, trials: int, epochs: int) -> None:
        """Begin a bar."""
        self._trials = trials
        self._task = self._bar.add_task(name, total=epochs, said="starting workers")

    def update(self, *, epochs: int, done: int, failed: int) -> None:
        """Move it."""
        said = f"{done} of {self._trials} trials" + (f", {failed} failed" if failed else "")
        self._bar.update(self._task, completed=epochs, said=said)


class RunBar(AbstractContextManager["RunBar"]):
    """A bar for one training."""

    def __init__(self, epochs: int) -> None:
        self._bar = _bar(errors())
        self._task = self._bar.add_task("training", total=epochs, said="")

    def __enter__(self) -> "RunBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def progress(self, *, epoch: int, epochs: int, active: int, headline: Mapping[str, float]) -> None:
        """Move it, with the figures worth a look."""
        del active
        shown = {"val/balanced_accuracy": "balanced accuracy", "train/total_g": "loss"}
        said = ", ".join(f"{name} {headline[key]:.3f}" for key, name in shown.items() if key in headline)
        self._bar.update(self._task, total=epochs, completed=epoch, said=said)
