"""Progress of a running sweep, read from the journals of its packs.

It works the same for every executor: a training only appends to a journal, in whatever process it runs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from modis_dist.execution.run_pack import Pack, journal_file
from modis_dist.runtime.file_watch import watching
from modis_dist.train.journal import JournalReader, Record


class Display(Protocol):
    """Shows the progress of a stage."""

    def stage(self, name: str, *, trials: int, epochs: int) -> None: ...

    def update(self, *, epochs: int, done: int, failed: int) -> None: ...


class JournalWatcher:
    """Reads new records from the journals of packs and counts epochs and finished trials."""

    def __init__(self, packs: Sequence[Pack], *, out: Path, display: Display) -> None:
        self._readers = [JournalReader(journal_file(out, pack)) for pack in packs]
        self.limit = {
            trial.id: trial.run.optim.epochs if pack.until is None else min(pack.until, trial.run.optim.epochs)
            for pack in packs
            for trial in pack.trials
        }
        self._epochs = dict.fromkeys(self.limit, 0)
        self._ended: dict[str, str] = {}
        self._display = display

    def poll(self) -> None:
        """Read new records and update the display."""
        for reader in self._readers:
            for record in reader.new():
                if record["trial"] in self.limit:
                    self._count(record)
        failed = sum(status == "failed" for status in self._ended.values())
        self._display.update(epochs=sum(self._epochs.values()), done=len(self._ended) - failed, failed=failed)

    def _count(self, record: Record) -> None:
        trial = record["trial"]
        if record["kind"] == "metrics":
            self._epochs[trial] = min(max(self._epochs[trial], record["step"]), self.limit[trial])
        if record["kind"] in {"end", "checkpoint"}:  # trained to its end, stopped early or failed
            self._epochs[trial] = self.limit[trial]
        if record["kind"] == "end":
            self._ended[trial] = record["values"]["status"]


@contextmanager
def monitored(packs: Sequence[Pack], *, out: Path, name: str, display: Display) -> Iterator[None]:
    """Show the progress of packs while they are trained."""
    watcher = JournalWatcher(packs, out=out, display=display)
    display.stage(name, trials=len(watcher.limit), epochs=sum(watcher.limit.values()))
    with watching(watcher.poll):
        yield
