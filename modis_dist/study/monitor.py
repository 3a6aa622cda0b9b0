"""Watching a running sweep through the journals its trials write: progress for people, records for the mirror.

One way for every executor: whoever trains, in whatever process, only appends to a journal.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from modis_dist.execution.run_pack import Pack, journal_file
from modis_dist.execution.trial import Trial
from modis_dist.runtime.file_watch import watching
from modis_dist.train.journal import JournalReader


class Feed(Protocol):
    """Who is given the records, in order."""

    def feed(self, records: Sequence[Mapping[str, Any]]) -> None: ...


class Display(Protocol):
    """Who is shown how far a stage is."""

    def stage(self, name: str, *, trials: int, epochs: int) -> None: ...

    def update(self, *, epochs: int, done: int, failed: int) -> None: ...


class Silent:
    """Shows nothing."""

    def stage(self, name: str, *, trials: int, epochs: int) -> None:
        """Nothing."""

    def update(self, *, epochs: int, done: int, failed: int) -> None:
        """Nothing."""


def _epochs(pack: Pack, trial: Trial) -> int:
    """How many a trial is trained, at most."""
    return trial.run.optim.epochs if pack.until is None else min(pack.until, trial.run.optim.epochs)


class Monitor:
    """Reads what is new in the journals of some packs, passes it on and counts."""

    def __init__(self, packs: Sequence[Pack], *, out: Path, feed: Feed, display: Display) -> None:
        self._readers = [JournalReader(journal_file(out, pack)) for pack in packs]
        self.limit = {t.id: _epochs(p, t) for p in packs for t in p.trials}
        self._epochs = dict.fromkeys(self.limit, 0)
        self._ended: dict[str, str] = {}
        self._feed = feed
        self._display = display

    def look(self) -> None:
        """Read what is new and pass it on."""
        for reader in self._readers:
            records = reader.new()
            self._feed.feed(records)
            for record in records:
                self._count(record)
        failed = sum(status == "failed" for status in self._ended.values())
        self._display.update(epochs=sum(self._epochs.values()), done=len(self._ended) - failed, failed=failed)

    def _count(self, record: Mapping[str, Any]) -> None:
        trial = record["trial"]
        if trial not in self.limit:
            return
        if record["kind"] == "metrics":
            self._epochs[trial] = min(max(self._epochs[trial], record["step"]), self.limit[trial])
        if record["kind"] in {"end", "checkpoint"}:  # trained to its end, stopped early or failed
            self._epochs[trial] = self.limit[trial]
        if record["kind"] == "end":
            self._ended[trial] = record["values"]["status"]


@contextmanager
def monitored(packs: Sequence[Pack], *, out: Path, name: str, feed: Feed, display: Display) -> Iterator[None]:
    """Watch the journals of some packs while they are trained."""
    monitor = Monitor(packs, out=out, feed=feed, display=display)
    display.stage(name, trials=len(monitor.limit), epochs=sum(monitor.limit.values()))
    with watching(monitor.look):
        yield
