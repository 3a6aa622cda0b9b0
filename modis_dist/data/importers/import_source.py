"""The interface between format readers and the import: feature names, then pieces of rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.store.reader import META
from modis_dist.runtime.errors import DataError, nearest
from modis_dist.runtime.text import shown

PIECE_BYTES = 32 << 20
EXACT_INTEGER = 2**24  # float32 cannot represent all integers beyond


@dataclass(frozen=True)
class Piece:
    """Consecutive rows: raw values of the metadata columns that exist, and features [n, p]."""

    meta: Mapping[str, Sequence[object]]
    x: NDArray[np.float32]
    done: int  # progress, in rows or (for text files) bytes
    total: int


@dataclass(frozen=True)
class Source:
    """One modality of a source."""

    modality: str
    where: str  # name of the source in messages
    features: tuple[str, ...]
    pieces: Callable[[Path], Iterator[Piece]]  # takes a private folder for large intermediate files


def piece_rows(features: int) -> int:
    """Return the rows per piece."""
    return max(1, min(65_536, PIECE_BYTES // (4 * features)))


def feature_columns(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the feature columns. Raises ``DataError`` for a missing or duplicate metadata column."""
    for required in ("sample_id", "label"):
        if required not in names:
            raise DataError(
                f"{where}: no column {required}{nearest(required, list(names[:1000]))}"
                f"{'; add it, empty for unknown classes' if required == 'label' else ''}"
            )
    for name in META:
        if names.count(name) > 1:
            raise DataError(f"{where}: column {name} is repeated ({names.count(name)} times); keep one")
    return tuple(name for name in names if name not in META)


def to_float32(x: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Convert to float32; values beyond its range become infinite, which the writer reports."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)


def refuse_lossy_integers(
    x: NDArray[Any], names: Sequence[str], where: str, *, first_row: int, lossy: NDArray[np.bool_] | None = None
) -> None:
    """Raise ``DataError`` if an integer in ``x`` [n, p] loses digits as float32; for float ``x``, pass ``lossy``."""
    if lossy is None:
        lossy = (x > EXACT_INTEGER) | (x < -EXACT_INTEGER)
    if lossy.any():
        row, column = np.argwhere(lossy)[0]
        raise DataError(
            f"{where}, data row {first_row + row}, column {shown(names[column])!r}: integer {int(x[row, column])} "
            f"loses digits as float32 (exact up to {EXACT_INTEGER}); scale or log-transform the column"
        )
