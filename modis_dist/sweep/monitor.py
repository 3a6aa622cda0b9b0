"""Watching a running sweep through the journals its trials write: progress for people, records for the mirror.

One way for every executor: whoever trains, in whatever process, only appends to a journal.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from modis_dist.sweep.execute import Pack, journal_file
from modis_dist.sweep.manifest import Trial
from modis_dist.train.journal import JournalReader

SECONDS_BETWEEN_LOOKS = 0.5
SHARE = 0.01  # of a core, at most, for looking: with a thousand journals less often


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
    """Reads the journals of some packs in a thread, from entering to leaving the ``with`` block."""

    def __init__(self, packs: Sequence[Pack], *, out: Path, name: str, feed: Feed, display: Display) -> None:
        self._readers = [JournalReader(journal_file(out, pack)) for pack in packs]
        self._limit = {t.id: _epochs(p, t) for p in packs for t in p.trials}
        self._epochs = dict.fromkeys(self._limit, 0)
        self._ended: dict[str, str] = {}
        self._feed = feed
        self._display = display
        self._name = name
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sweep monitor", daemon=True)

    def __enter__(self) -> "Monitor":
        self._display.stage(self._name, trials=len(self._limit), epochs=sum(self._limit.values()))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

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
        if trial not in self._limit:
            return
        if record["kind"] == "metrics":
            self._epochs[trial] = min(max(self._epochs[trial], record["step"]), self._limit[trial])
        if record["kind"] in {"end", "checkpoint"}:  # trained to its end, stopped early or failed
            self._epochs[trial] = self._limit[trial]
        if record["kind"] == "end":
            self._ended[trial] = record["values"]["status"]

    def _watch(self) -> None:
        """Until told to stop. What goes wrong here goes wrong again in the last look, where it is raised."""
        with suppress(Exception):
            spent = 0.0
            while not self._stop.wait(max(SECONDS_BETWEEN_LOOKS, spent / SHARE)):
                began = time.thread_time()
                self.look()
                spent = time.thread_time() - began
