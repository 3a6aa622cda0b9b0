"""Readers hold a small part of a file in memory, for any size and layout of the file."""

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from modis_dist.data.importers import import_source as source_module
from modis_dist.data.importers import transpose
from modis_dist.data.importers.convert import READERS, tables

ROWS, FEATURES = 600, 2000
PART = 1 << 16  # bytes that are read at a time
NAMES = [f"g{i}" for i in range(FEATURES)]


def numbers() -> NDArray[np.float32]:
    """Return numbers that are short as text, half of them 0."""
    return np.random.default_rng(0).integers(0, 9, (ROWS, FEATURES)).clip(4).astype(np.float32) - 4


def table(x: NDArray[np.float32]) -> pa.Table:
    meta = {"sample_id": [f"s{i}" for i in range(len(x))], "label": ["ab"[i % 2] for i in range(len(x))]}
    return pa.table(meta | {name: x[:, column] for column, name in enumerate(NAMES)})


def write(path: Path, x: NDArray[np.float32], layout: str) -> None:
    if layout == "parquet":
        pq.write_table(table(x), path, row_group_size=len(x))
    elif layout.startswith("csv"):
        table(x.astype(np.int8)).to_pandas().to_csv(path, index=False)
    else:
        import anndata
        from scipy import sparse

        make = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[layout]
        obs = pd.DataFrame({"label": ["a"] * len(x)}, index=[f"s{i}" for i in range(len(x))])
        anndata.AnnData(make(x), obs=obs, var=pd.DataFrame(index=NAMES)).write_h5ad(path)


def peaks_of(path: Path, scratch: Path, x: NDArray[np.float32]) -> tuple[int, int]:
    """Return the peak memory of NumPy while reading all rows, and of Arrow between two blocks."""
    suffix = next(suffix for suffix in READERS if path.name.endswith(suffix))
    (source,) = READERS[suffix](path, "mirna")
    row, before, arrow = 0, pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for piece in source.pieces(scratch):
            assert (piece.x == x[row : row + len(piece.x)]).all()
            row += len(piece.x)
            arrow = max(arrow, pa.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert row == len(x) and not [*scratch.iterdir()]
    return peak, arrow


LAYOUTS = {
    "csv": ".csv",
    "csv packed": ".csv.gz",
    "parquet": ".parquet",
    "dense": ".h5ad",
    "csr": ".h5ad",
    "csc": ".h5ad",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reading_a_file_takes_the_memory_of_a_few_blocks(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if LAYOUTS[layout] == ".h5ad" and importlib.util.find_spec("anndata") is None:
        pytest.skip("needs the extra anndata")
    for module, name in (
        (source_module, "PIECE_BYTES"),
        (tables, "WHOLE_GROUP_BYTES"),
        (transpose, "COLUMN_BLOCK_BYTES"),
    ):
        monkeypatch.setattr(module, name, PART)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    x, path = numbers(), tmp_path / f"mirna{LAYOUTS[layout]}"
    write(path, x, layout)
    first = numbers()[:3]
    write(tmp_path / f"few{LAYOUTS[layout]}", first, layout)
    peaks_of(tmp_path / f"few{LAYOUTS[layout]}", scratch, first)  # the first call imports modules and fills caches
    numpys, arrows = peaks_of(path, scratch, x)
    assert numpys < x.nbytes / 4
    assert arrows < x.nbytes / 4 or layout.startswith("csv"), "Arrow holds one block of text, here the whole file"


def test_text_blocks_are_bounded_for_long_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TEXT_BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(tables, "WIDE_BLOCK_BYTES", 1 << 14)
    wide = pd.DataFrame(np.zeros((400, 100)), columns=[f"{'n' * 100}{i}" for i in range(100)]).astype(int)
    wide.insert(0, "sample_id", [f"s{i}" for i in range(400)])
    wide.insert(1, "label", "a")
    wide.to_csv(tmp_path / "mirna.csv", index=False)
    (source,) = tables.text(tmp_path / "mirna.csv", "mirna", delimiter=",")
    assert len([*source.pieces(tmp_path)]) >= 2
