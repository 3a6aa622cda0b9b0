"""Feature matrices that may exceed memory: lazy row views, and arrays kept in memory or memory-mapped from disk.

Arrays on disk are unnamed files in the temporary folder (TMPDIR), which the system removes when the process ends. They
behave like arrays in memory. Independent of the store and of the meaning of rows.
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
from modis_dist.runtime.errors import DataError, RunFailed
from modis_dist.runtime.file_systems import IN_MEMORY, file_system
from modis_dist.runtime.text import shown

FeatureStorage = Literal["memory", "disk"]

VALUES_PER_BLOCK = 1 << 22  # 32 MiB of float64
BYTES_PER_VALUE = 4

ADVICE = "set TMPDIR to a folder on a disk with enough space, or set trainer.feature_storage to memory"


class Matrix(Protocol):
    """Features [n, p] from which rows can be read: an array, or an object with its interface."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, features)."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def __getitem__(self, rows: Any, /) -> Any:
        """Return the features of a slice or of positions."""
        ...


@dataclass(frozen=True)
class RowView:
    """Selected rows and columns of a matrix; data is copied only when it is read."""

    x: Matrix
    rows: Rows
    columns: Rows | None = None  # None: all

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, features)."""
        return len(self.rows), self.x.shape[1] if self.columns is None else len(self.columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Any) -> Features:
        """Return the features of a slice or of positions."""
        selected: Features = self.x[self.rows[rows]]
        return selected if self.columns is None else selected[:, self.columns]


def slices(count: int, width: int, *, at_least: int = 1, values: int | None = None) -> Iterator[slice]:
    """Yield slices of 0..count, each with about ``values`` values and ``at_least`` rows (if there are as many)."""
    size = max((values or VALUES_PER_BLOCK) // max(width, 1), at_least)
    edges = np.linspace(0, count, max(count // size, 1) + 1).astype(int)
    yield from (slice(int(start), int(stop)) for start, stop in pairwise(edges))


def materialise(shape: tuple[int, int], blocks: Iterable[NDArray[Any]], *, storage: FeatureStorage) -> Features:
    """Concatenate blocks of rows to one float32 array, kept in memory or on disk.

    Raises ``RunFailed`` if the disk is full or fails.
    """
    if storage == "memory" or not prod(shape):  # an empty file cannot be mapped
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
    """Write a file, then map it: a disk error raises here, whereas writing to a map would kill the process."""
    size, folder = BYTES_PER_VALUE * prod(shape), Path(tempfile.gettempdir())
    try:
        with tempfile.TemporaryFile() as file:
            for block in blocks:
                file.write(np.ascontiguousarray(block, dtype=np.float32).data)
            assert file.tell() == size
            file.flush()
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        reason = f"cannot store {size / 1e9:.1f} GB of features ({error.strerror or error})"
        raise RunFailed(f"{shown(str(folder))}: {reason}; {ADVICE}; rerun the same command to resume") from error
    return np.frombuffer(mapped, dtype=np.float32).reshape(shape)


def refuse_insufficient_scratch(needed: int) -> None:
    """Raise ``DataError`` if the temporary folder has fewer than ``needed`` bytes free or is in memory."""
    if (problem := insufficient_scratch(needed)) is not None:
        raise DataError(problem)


def insufficient_scratch(needed: int) -> str | None:
    """Return why the temporary folder cannot store ``needed`` bytes of features, with advice, or None if it can."""
    folder = Path(tempfile.gettempdir())
    where = f"{shown(str(folder))}: features need {needed / 1e9:.1f} GB"
    if (kind := file_system(folder)) in IN_MEMORY:
        return f"{where}, but the folder is in memory ({kind}); {ADVICE}"
    free = psutil.disk_usage(str(folder)).free
    return None if free >= needed else f"{where}, but {free / 1e9:.1f} GB are free; {ADVICE}"
