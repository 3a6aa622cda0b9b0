"""Readers of wide tables (Parquet, CSV, TSV), in bounded memory."""

import csv as text_csv
import gzip
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from modis_dist.data.importers.import_source import (
    EXACT_INTEGER,
    Piece,
    Source,
    feature_columns,
    piece_rows,
    refuse_lossy_integers,
    to_float32,
)
from modis_dist.data.importers.transpose import by_rows, column_slices
from modis_dist.data.store.reader import META, reading
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.text import shown

WHOLE_GROUP_BYTES = 128 << 20  # smaller row groups (as float32) are read at once
TEXT_BLOCK_BYTES = 4 << 20
WIDE_BLOCK_BYTES = 64 << 20  # for wide tables: every block has a cost per column
_CELL = re.compile(r"In CSV column #(\d+): Row #(\d+): CSV conversion error to \w+: (.*)", re.DOTALL)
_LINE = re.compile(r"CSV parse error: Row #(\d+): (Expected \d+ columns, got \d+)")
_INDEX_COLUMN = re.compile(r"Unnamed: \d+|__index_level_\d+__")


def parquet(path: Path, modality: str) -> list[Source]:
    """Return the modality of a wide Parquet file."""
    where = shown(path.name)
    with reading(where):
        schema = pq.read_schema(path)
        names = _columns(schema.names, where)
        for field in schema:
            _refuse_type(field, where)
    return [Source(modality, where, names, partial(_parquet_pieces, path, names, where))]


def text(path: Path, modality: str, *, delimiter: str) -> list[Source]:
    """Return the modality of a delimited text file (may be gzip-compressed)."""
    where = shown(path.name)
    header = _header(path, where, delimiter)
    names = _columns(header, where)
    return [Source(modality, where, names, partial(_text_pieces, path, tuple(header), where, delimiter))]


def _columns(names: Sequence[str], where: str) -> tuple[str, ...]:
    features = feature_columns(names, where)
    for name in features:
        if _INDEX_COLUMN.fullmatch(name):
            raise DataError(f"{where}: column {shown(name)!r} is a saved row index; remove it")
    return features


# --- Parquet --------------------------------------------------------------------------------------------------


def _refuse_type(field: pa.Field, where: str) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    number = pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if field.name in META:
        if not (number or is_text or (pa.types.is_boolean(kind) and field.name == "label")):
            raise DataError(f"{where}: column {field.name} has type {field.type}; convert it to text")
    elif not number or kind is not field.type:
        raise DataError(
            f"{where}: column {shown(field.name)!r} has type {field.type}; features must be float or integer columns"
        )


def _parquet_pieces(path: Path, names: tuple[str, ...], where: str, scratch: Path) -> Iterator[Piece]:
    with reading(where), pq.ParquetFile(path, page_checksum_verification=True) as file:
        present = [name for name in META if name in file.schema_arrow.names]
        step, done = piece_rows(len(names)), 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            columns = file.read_row_group(group, columns=present).select(present)
            columns.validate(full=True)  # text that is not UTF-8
            read = _at_once if 4 * rows * len(names) <= WHOLE_GROUP_BYTES else partial(_by_columns, scratch=scratch)
            for start, x in read(file, group, names, where, step=step, first_row=done + 1):
                meta = {name: columns[name].slice(start, len(x)).to_pylist() for name in present}
                yield Piece(meta, x, done + start + len(x), file.metadata.num_rows)
            done += rows


def _at_once(
    file: pq.ParquetFile, group: int, names: Sequence[str], where: str, *, step: int, first_row: int
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield row offset and features of slices of a row group that fits in memory."""
    x = _numbers(file.read_row_group(group, columns=list(names)).select(list(names)), where, first_row=first_row)
    for start in range(0, len(x), step):
        yield start, x[start : start + step]


def _by_columns(
    file: pq.ParquetFile, group: int, names: Sequence[str], where: str, *, step: int, first_row: int, scratch: Path
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """As ``_at_once`` for a row group larger than memory: transposes blocks of columns through a file."""
    rows = file.metadata.row_group(group).num_rows
    columns = column_slices(rows, len(names))
    parts = (list(names[part]) for part in columns)
    tables = (file.read_row_group(group, columns=part).select(part) for part in parts)
    blocks = (_numbers(table, where, first_row=first_row) for table in tables)
    return by_rows(blocks, columns, rows=rows, step=step, scratch=scratch)


def _numbers(table: pa.Table, where: str, *, first_row: int) -> NDArray[np.float32]:
    """Return features [n, p] of numeric columns, NaN for null. Raises ``DataError`` for integers that lose digits."""
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        array = column.combine_chunks()
        is_float = pa.types.is_float32(array.type) or pa.types.is_float64(array.type)
        columns.append(array if is_float else _as_float32(array, name, where, first_row=first_row))
    batch = pa.RecordBatch.from_arrays(columns, names=table.column_names)
    return to_float32(batch.to_tensor(null_to_nan=True, row_major=True).to_numpy())


def _as_float32(column: pa.Array, name: str, where: str, *, first_row: int) -> pa.Array:
    """Convert a column of integers, half floats or nulls to float32."""
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.float32())
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    if pa.types.is_integer(column.type):
        refuse_lossy_integers(values[:, None], [name], where, first_row=first_row)
    return pa.array(values.astype(np.float32), mask=column.is_null().to_numpy(zero_copy_only=False))


# --- text -----------------------------------------------------------------------------------------------------


def _header(path: Path, where: str, delimiter: str) -> list[str]:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            return next(text_csv.reader(file, delimiter=delimiter))
    except StopIteration:
        raise DataError(f"{where}: empty file") from None
    except UnicodeDecodeError:
        raise DataError(f"{where}: not UTF-8; save the file as UTF-8") from None
    except (OSError, EOFError, text_csv.Error) as error:
        raise DataError(f"{where}: cannot be read ({shown(str(error))})") from error


def _text_pieces(path: Path, header: tuple[str, ...], where: str, delimiter: str, _scratch: Path) -> Iterator[Piece]:
    names = [name for name in header if name not in META]
    present = [name for name in META if name in header]
    total, row = path.stat().st_size, 1
    try:
        with reading(where), pa.OSFile(str(path)) as raw:
            packed = path.name.lower().endswith(".gz")
            stream = pa.CompressedInputStream(raw, "gzip") if packed else raw
            for part in _parts(_text_batches(stream, header, delimiter), rows=piece_rows(len(names))):
                x = _numbers_of_text(part.select(names), where, first_row=row)
                meta = {name: part[name].to_pylist() for name in present}
                yield Piece(meta, x, raw.tell(), total)
                row += len(x)
    except DataError as error:
        raise _located(error, header, where) from error


def _parts(batches: Iterator[pa.RecordBatch], *, rows: int) -> Iterator[pa.RecordBatch]:
    """Split batches to at most ``rows`` rows: parsed numbers take many times the memory of short text."""
    for batch in batches:
        yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _text_batches(stream: pa.NativeFile, header: tuple[str, ...], delimiter: str) -> Iterator[pa.RecordBatch]:
    types = {name: pa.string() if name in META else pa.float64() for name in header}
    wide = min(64 * sum(len(name) + 1 for name in header), WIDE_BLOCK_BYTES)
    longest = 64 * len(header)  # bytes of a line; a block must contain whole lines
    return iter(
        pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=max(TEXT_BLOCK_BYTES, wide, longest)),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter),
            convert_options=pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True),
        )
    )


def _numbers_of_text(batch: pa.RecordBatch, where: str, *, first_row: int) -> NDArray[np.float32]:
    """Return features [n, p] of parsed columns. Raises ``DataError`` for integers that lose digits."""
    x = batch.to_tensor(null_to_nan=True, row_major=True).to_numpy()
    large = (np.abs(x) > EXACT_INTEGER) & (np.abs(x) < 2**53)
    if large.any():
        lossy = large & (x == np.floor(x)) & (to_float32(x) != x)
        refuse_lossy_integers(x, batch.schema.names, where, first_row=first_row, lossy=lossy)
    return to_float32(x)


def _located(error: DataError, header: Sequence[str], where: str) -> DataError:
    """Convert column number and row in an Arrow error to column name and line of the file."""
    message = str(error.__cause__ or "")
    if cell := _CELL.search(message):
        name, problem = header[int(cell[1])], cell[3].replace("invalid value ", "not a number: ")
        return DataError(f"{where}, line {cell[2]}, column {shown(name)!r}: {shown(problem)}")
    if line := _LINE.search(message):
        return DataError(f"{where}, line {line[1]}: {line[2]}")
    return error
