"""The ports of a study: the executor that trains its packs, and the mirror of its trials."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

from modis_dist.execution.run_pack import Pack


class Executor(AbstractContextManager["Executor"], Protocol):
    """Trains packs; used in a ``with`` block."""

    slots: int  # packs trained at once
    threads: int  # CPU threads of each

    def execute(self, packs: Sequence[Pack], *, out: Path, store: Path) -> Mapping[str, str]:
        """Train packs; returns why trials crashed, by id.

        Raises ``Interrupted`` if the user stops it, ``RunFailed`` if the machine or Ray fails.
        """
        ...


class Mirror(Protocol):
    """Who is told about trials; every call returns at once."""

    def start(self, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> None: ...

    def trial(self, trial: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None: ...

    def feed(self, records: Sequence[Mapping[str, Any]]) -> None: ...

    def end_trial(
        self,
        trial: str,
        *,
        status: Literal["FINISHED", "FAILED", "KILLED"],
        metrics: Mapping[str, float],
        artifacts: Sequence[Path],
    ) -> None: ...

    def finish(
        self,
        *,
        status: Literal["FINISHED", "FAILED", "KILLED"],
        metrics: Mapping[str, float],
        artifacts: Sequence[Path],
        model: Path | None,
    ) -> None: ...

    def describe(self) -> dict[str, str]: ...
