"""Out-of-core transposition: from blocks of columns to blocks of rows, for matrices larger than memory.

Uses an unnamed file in a private folder, which the system removes when the process ends.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.store.writer import writing

COLUMN_BLOCK_BYTES = 64 << 20


def column_slices(rows: int, features: int) -> list[slice]:
    """Return slices of columns with a fixed size in memory (as float32), at least one column each."""
    width = max(1, COLUMN_BLOCK_BYTES // (4 * max(1, rows)))
    return [slice(first, min(first + width, features)) for first in range(0, features, width)]


def by_rows(
    blocks: Iterable[NDArray[np.float32]], columns: list[slice], *, rows: int, step: int, scratch: Path
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield row offset and features of slices of ``step`` rows, given adjacent blocks [rows, columns].

    Stores the whole matrix in ``scratch`` temporarily. Raises ``DataError`` if the disk is full.
    """
    with tempfile.TemporaryFile(dir=scratch) as on_disk:
        for block in blocks:
            with writing(scratch):
                on_disk.write(np.ascontiguousarray(block).data)
                on_disk.flush()  # a full disk raises here
        for start in range(0, rows, step):
            x = np.empty((min(step, rows - start), columns[-1].stop if columns else 0), dtype=np.float32)
            for part in columns:
                width = part.stop - part.start
                on_disk.seek(4 * (rows * part.start + start * width))
                x[:, part] = np.fromfile(on_disk, np.float32, len(x) * width).reshape(len(x), width)
            yield start, x
