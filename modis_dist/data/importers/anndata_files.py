"""Readers of AnnData ``.h5ad`` and MuData ``.h5mu`` files; the matrix stays on disk.

Both are HDF5; a ``.h5mu`` file has one AnnData group per modality. Needs the extra ``modis-dist[anndata]``.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.importers.import_source import (
    Piece,
    Source,
    piece_rows,
    refuse_lossy_integers,
    to_float32,
)
from modis_dist.data.importers.transpose import by_rows, column_slices
from modis_dist.data.store.reader import META, reading
from modis_dist.runtime.errors import DataError, nearest
from modis_dist.runtime.text import shown

if TYPE_CHECKING:
    import pandas as pd


def h5ad(path: Path, modality: str) -> list[Source]:
    """Return the modality of an AnnData file; sample ids are ``obs_names`` unless ``obs`` has a ``sample_id``."""
    return _sources(path, {modality: "/"})


def h5mu(path: Path, _modality: str) -> list[Source]:
    """Return the modalities of a MuData file; columns missing in a modality's ``obs`` come from the global ``obs``."""
    with _opened(path) as file:
        return _sources(path, {name: f"/mod/{name}" for name in file["mod"]})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an HDF5 file. Raises ``DataError`` if the extra is not installed or the file is damaged."""
    if importlib.util.find_spec("anndata") is None:
        raise DataError(f"{shown(path.name)}: requires an optional dependency; run `pip install 'modis-dist[anndata]'`")
    import h5py  # type: ignore[import-untyped]

    with reading(shown(path.name)), h5py.File(path) as file:
        yield file


def _sources(path: Path, groups: dict[str, str]) -> list[Source]:
    sources = []
    with _opened(path) as file:
        from anndata.io import read_elem

        for modality, group in groups.items():
            where = shown(path.name) if group == "/" else shown(f"{path.name}:{modality}")
            with reading(where):
                names = tuple(str(name) for name in read_elem(file[group]["var"]).index)
                _refuse_matrix(file[group], len(names), where)
            sources.append(Source(modality, where, names, partial(_pieces, path, group, names, where)))
    return sources


def _refuse_matrix(group: Any, features: int, where: str) -> None:
    """Raise ``DataError`` unless ``X`` is a numeric matrix with one column per feature."""
    if "X" not in group or getattr(_matrix(group), "ndim", 2) != 2:
        raise DataError(f"{where}: no matrix X; save the values to import in X")
    matrix = _matrix(group)
    if matrix.dtype.kind not in "fiu":
        raise DataError(f"{where}: X has type {matrix.dtype}; expected floats or integers")
    if matrix.shape[1] != features:
        raise DataError(f"{where}: X has {matrix.shape[1]} columns, var has {features} rows")


def _matrix(group: Any) -> Any:
    """Return the matrix on disk, dense or sparse; both support slicing of rows."""
    from anndata.io import sparse_dataset

    x = group["X"]
    return x if hasattr(x, "shape") else sparse_dataset(x)


def _pieces(path: Path, group: str, names: tuple[str, ...], where: str, scratch: Path) -> Iterator[Piece]:
    with _opened(path) as file:
        meta = _meta(file, group, where)
        matrix = _matrix(file[group])
        rows, step = len(meta["label"]), piece_rows(len(names))
        read = partial(_by_columns, scratch=scratch) if getattr(matrix, "format", "") == "csc" else _by_rows
        for start, x in read(matrix, names, where, rows=rows, step=step):
            rows_meta = {name: values[start : start + len(x)] for name, values in meta.items()}
            yield Piece(rows_meta, x, start + len(x), rows)


def _by_rows(
    matrix: Any, names: tuple[str, ...], where: str, *, rows: int, step: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield row offset and features of slices of ``step`` rows."""
    for start in range(0, rows, step):
        yield start, _numbers(_dense(matrix[start : start + step]), names, where, first_row=start + 1)


def _by_columns(
    matrix: Any, names: tuple[str, ...], where: str, *, rows: int, step: int, scratch: Path
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """As ``_by_rows`` for a column-sparse matrix (CSC), where slicing rows would read the whole matrix each time."""
    columns = column_slices(rows, len(names))
    blocks = (_numbers(_dense(matrix[:, part]), names[part], where, first_row=1) for part in columns)
    return by_rows(blocks, columns, rows=rows, step=step, scratch=scratch)


def _dense(x: Any) -> NDArray[Any]:
    dense: NDArray[Any] = x if isinstance(x, np.ndarray) else x.toarray()
    return dense


def _meta(file: Any, group: str, where: str) -> dict[str, list[object]]:
    from anndata.io import read_elem

    obs: pd.DataFrame = read_elem(file[group]["obs"])
    common: pd.DataFrame = read_elem(file["obs"]).reindex(obs.index) if group != "/" else obs
    meta: dict[str, list[object]] = {"sample_id": [str(name) for name in obs.index]}
    for name in META:
        frame = obs if name in obs else common
        if name in frame:
            meta[name] = [
                None if missing else value for value, missing in zip(frame[name], frame[name].isna(), strict=True)
            ]
    if "label" not in meta:
        hint = nearest("label", [str(name) for name in obs.columns])
        raise DataError(f"{where}: obs has no column label{hint}; add it, empty for unknown classes")
    return meta


def _numbers(x: NDArray[Any], names: tuple[str, ...], where: str, *, first_row: int) -> NDArray[np.float32]:
    if x.dtype.kind in "iu":
        refuse_lossy_integers(x, names, where, first_row=first_row)
    return to_float32(x)
