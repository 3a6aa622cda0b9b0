"""Progress of a training in other processes, read from the journal that it writes."""

from pathlib import Path

from modis_dist.train.callbacks import Reporter
from modis_dist.train.journal import JournalReader


class JournalWatcher:
    """Reports the epochs of one training to a reporter; ``epochs_before`` is added to each epoch."""

    def __init__(self, journal: Path, reporter: Reporter, *, epochs: int, epochs_before: int = 0) -> None:
        self._reader = JournalReader(journal)
        self._reporter = reporter
        self._epochs = epochs
        self._epochs_before = epochs_before

    def poll(self) -> None:
        """Read the new records of the journal and report them."""
        for record in self._reader.new():
            if record["kind"] == "metrics":
                epoch = self._epochs_before + record["step"]
                self._reporter.progress(epoch=epoch, epochs=self._epochs, active=1, headline=record["values"])
