"""Interfaces of a study to the layers above it: the executor that trains its packs, and the tracking."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from modis_dist.execution.run_pack import Pack


class Executor(Protocol):
    """Trains packs."""

    slots: int  # packs trained at once
    threads: int  # CPU threads of each pack

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train packs; return crash reasons by trial id.

        Raises ``Interrupted`` if the user stops it, ``RunFailed`` if the machine or Ray fails.
        """
        ...


@dataclass(frozen=True)
class Tracking:
    """MLflow store and experiment of a study."""

    uri: str  # without password
    experiment: str
    start: Callable[[], None]  # called once the run folder is locked and the manifest is written
