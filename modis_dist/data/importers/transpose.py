"""From blocks of columns to blocks of rows: for a matrix too large for memory whose file gives columns only.

It goes through a file without a name in a private folder, which is gone with the process however that ends.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.store.writer import writing

COLUMN_BLOCK_BYTES = 64 << 20


def column_slices(rows: int, features: int) -> list[slice]:
    """Columns that are read at once: so many that their float32 take one size, but one at least."""
    width = max(1, COLUMN_BLOCK_BYTES // (4 * max(1, rows)))
    return [slice(first, min(first + width, features)) for first in range(0, features, width)]


def by_rows(
    blocks: Iterable[NDArray[np.float32]], columns: list[slice], *, rows: int, step: int, scratch: Path
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Row offset and features of slices of ``step`` rows, of blocks [rows, columns] that stand side by side.

    The private folder ``scratch`` has all of it on its disk meanwhile. Raises ``DataError`` where that takes no more.
    """
    with tempfile.TemporaryFile(dir=scratch) as on_disk:
        for block in blocks:
            with writing(scratch):
                on_disk.write(np.ascontiguousarray(block).data)
                on_disk.flush()  # where the disk is full, it is known here
        for start in range(0, rows, step):
            x = np.empty((min(step, rows - start), columns[-1].stop if columns else 0), dtype=np.float32)
            for place in columns:
                width = place.stop - place.start
                on_disk.seek(4 * (rows * place.start + start * width))
                x[:, place] = np.fromfile(on_disk, np.float32, len(x) * width).reshape(len(x), width)
            yield start, x
