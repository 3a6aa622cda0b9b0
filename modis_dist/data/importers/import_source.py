"""What a reader of a source format hands to the importer: names first, then pieces of rows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from modis_dist.data.store.reader import META
from modis_dist.runtime.errors import DataError, nearest, shown

PIECE_BYTES = 32 << 20
EXACT_INTEGER = 2**24  # beyond it float32 skips integers


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows: raw values of the metadata columns that exist, features [n, p]."""

    meta: Mapping[str, Sequence[object]]
    x: NDArray[np.float32]
    done: int  # of the total, in rows or, for text, in bytes
    total: int


@dataclass(frozen=True)
class Source:
    """One modality of a source."""

    modality: str
    where: str  # how messages name it
    features: tuple[str, ...]
    pieces: Callable[[Path], Iterator[Piece]]  # of a private folder for large intermediate files


def piece_rows(features: int) -> int:
    """Rows of a piece, from its width."""
    return max(1, min(65_536, PIECE_BYTES // (4 * features)))


def feature_columns(names: Sequence[str], where: str) -> tuple[str, ...]:
    """The columns that are features. Raises ``DataError`` where a metadata column is absent or occurs twice."""
    for required in ("sample_id", "label"):
        if required not in names:
            raise DataError(
                f"{where}: there is no column {required}{nearest(required, list(names[:1000]))}"
                f"{'; add it, empty where the class is unknown' if required == 'label' else ''}"
            )
    for name in META:
        if names.count(name) > 1:
            raise DataError(f"{where}: column {name} occurs {names.count(name)} times; keep one")
    return tuple(name for name in names if name not in META)


def narrowed(x: NDArray[np.float64] | NDArray[np.float32]) -> NDArray[np.float32]:
    """As float32; what is beyond its range becomes infinite, which the writer refuses by name."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x, dtype=np.float32)


def refuse_lossy_integers(
    lossy: NDArray[np.bool_], x: NDArray[np.generic], names: Sequence[str], where: str, *, first_row: int
) -> None:
    """Name the first integer of ``x`` [n, p] that would lose digits as float32, if any is marked."""
    if lossy.any():
        row, column = np.argwhere(lossy)[0]
        raise DataError(
            f"{where}, data row {first_row + row}, column {shown(names[column])!r}: the integer {int(x[row, column])} "
            f"is beyond {EXACT_INTEGER} and would lose digits as float32; scale or log-transform it"
        )


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Whatever a library raises on a damaged file, as one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, pa.ArrowException) as error:
        raise DataError(f"{where}: cannot be read ({shown(str(error))})") from error
