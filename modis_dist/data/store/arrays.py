"""Features that may be larger than memory: rows read where they are needed, and new rows kept in memory or on a disk.

On a disk they lie in a file without a name in the temporary folder (TMPDIR), which is gone with the process however
that ends; of it the system holds in memory what is in use. Who reads such an array cannot tell. Knows neither the
store nor what rows mean.
"""

import mmap
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from modis_dist.data.store.index import Features, Rows
from modis_dist.runtime.errors import DataError, RunFailed, shown
from modis_dist.runtime.file_systems import IN_MEMORY, file_system

FeatureStorage = Literal["memory", "disk"]

VALUES_PER_BLOCK = 1 << 22  # 32 MiB of float64
BYTES_PER_VALUE = 4
ADVICE = "set TMPDIR to a folder on a disk with room, or trainer.features_in to memory"


class Matrix(Protocol):
    """Rows of features [n, p] of which some are read at a time: an array, or what looks like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and features."""
        ...

    def __len__(self) -> int:
        """Rows."""
        ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Features of a slice of the rows, or of positions."""
        ...


@dataclass(frozen=True)
class RowView:
    """Some rows, and some columns, of a matrix; copied only where and when they are read."""

    x: Matrix
    rows: Rows
    columns: Rows | None = None  # all of them

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and features."""
        return len(self.rows), self.x.shape[1] if self.columns is None else len(self.columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Features:
        """Features of a slice of the rows, or of positions among them."""
        held: Features = self.x[self.rows[rows]]
        return held if self.columns is None else held[:, self.columns]


def slices(count: int, width: int, *, at_least: int = 1, values: int | None = None) -> Iterator[slice]:
    """Slices of 0..count, each of about so many ``values`` and, where there are, ``at_least`` so many rows."""
    size = max((values or VALUES_PER_BLOCK) // max(width, 1), at_least)
    edges = np.linspace(0, count, max(count // size, 1) + 1).astype(int)
    yield from (slice(int(start), int(stop)) for start, stop in pairwise(edges))


def materialise(shape: tuple[int, int], blocks: Iterable[NDArray[Any]], *, place: FeatureStorage) -> Features:
    """The blocks below each other as one float32 array of that shape, kept in a place.

    Raises ``RunFailed`` where the disk does not take them.
    """
    if place == "memory" or not prod(shape):  # no file can be mapped of which there is nothing
        return _in_memory(shape, blocks)
    return _on_disk(shape, blocks)


def _in_memory(shape: tuple[int, int], blocks: Iterable[NDArray[Any]]) -> Features:
    x, start = np.empty(shape, dtype=np.float32), 0
    for block in blocks:
        x[start : start + len(block)] = block
        start += len(block)
    assert start == len(x)
    return x


def _on_disk(shape: tuple[int, int], blocks: Iterable[NDArray[Any]]) -> Features:
    """Written as a file and only then mapped: a disk that fails raises here, where a map would end the process."""
    size, folder = BYTES_PER_VALUE * prod(shape), Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile() as file:
            for block in blocks:
                file.write(np.ascontiguousarray(block, dtype=np.float32).data)
            assert file.tell() == size
            file.flush()
            held = mmap.mmap(file.fileno(), size)
    except OSError as error:
        why = f"{size / 1e9:.1f} GB of features cannot be kept there ({error.strerror or error})"
        raise RunFailed(f"{shown(str(folder))}: {why}; {ADVICE}; the same command continues") from error
    return np.frombuffer(held, dtype=np.float32).reshape(shape)


def refuse_insufficient_scratch(needed: int) -> None:
    """Raise ``DataError`` where the temporary folder has not so many bytes to give, or is no disk but memory."""
    if (problem := insufficient_scratch(needed)) is not None:
        raise DataError(problem)


def insufficient_scratch(needed: int) -> str | None:
    """Why so many bytes of features cannot be kept in the temporary folder, and what to do; None where they can."""
    folder = Path(tempfile.gettempdir())
    where = f"{shown(str(folder))}: {needed / 1e9:.1f} GB of features are to be kept there"
    if file_system(folder) in IN_MEMORY:
        return f"{where}, and it lies in memory itself; {ADVICE}"
    free = psutil.disk_usage(str(folder)).free
    return None if free >= needed else f"{where}, and {free / 1e9:.1f} GB are free; {ADVICE}"
