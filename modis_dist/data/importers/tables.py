"""Reads wide tables - Parquet, CSV, TSV - as pieces of rows in bounded memory."""

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
    narrowed,
    piece_rows,
    reading,
    refuse_lossy_integers,
)
from modis_dist.data.importers.transpose import by_rows, column_slices
from modis_dist.data.store.reader import META
from modis_dist.runtime.errors import DataError, shown

WHOLE_GROUP_BYTES = 128 << 20  # a row group that takes less as float32 is read at once
TEXT_BLOCK_BYTES = 4 << 20
WIDE_BLOCK_BYTES = 64 << 20  # of wide tables, of which every block costs time for every column
_CELL = re.compile(r"In CSV column #(\d+): Row #(\d+): CSV conversion error to \w+: (.*)", re.DOTALL)
_LINE = re.compile(r"CSV parse error: Row #(\d+): (Expected \d+ columns, got \d+)")
_INDEX_COLUMN = re.compile(r"Unnamed: \d+|__index_level_\d+__")


def parquet(path: Path, modality: str) -> list[Source]:
    """The modality in a wide Parquet file."""
    where = shown(path.name)
    with reading(where):
        schema = pq.read_schema(path)
        names = _columns(schema.names, where)
        for field in schema:
            _refuse_type(field, where)
    return [Source(modality, where, names, partial(_parquet_pieces, path, names, where))]


def csv(path: Path, modality: str) -> list[Source]:
    """The modality in a comma-separated file, perhaps compressed."""
    return _text(path, modality, ",")


def tsv(path: Path, modality: str) -> list[Source]:
    """The modality in a tab-separated file, perhaps compressed."""
    return _text(path, modality, "\t")


def _columns(names: Sequence[str], where: str) -> tuple[str, ...]:
    features = feature_columns(names, where)
    for name in features:
        if _INDEX_COLUMN.fullmatch(name):
            raise DataError(f"{where}: column {shown(name)!r} is a row index that was saved by mistake; remove it")
    return features


# --- Parquet --------------------------------------------------------------------------------------------------


def _refuse_type(field: pa.Field, where: str) -> None:
    held = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    number = pa.types.is_floating(held) or pa.types.is_integer(held) or pa.types.is_null(held)
    text = pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)
    if field.name in META:
        if not (number or text or (pa.types.is_boolean(held) and field.name == "label")):
            raise DataError(f"{where}: column {field.name} has type {field.type}; write it as text")
    elif not number or held is not field.type:
        raise DataError(
            f"{where}: column {shown(field.name)!r} has type {field.type}; a feature is a float or integer column"
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
    """Row offset and features of slices of a row group that is held whole."""
    x = _numbers(file.read_row_group(group, columns=list(names)).select(list(names)), where, first_row=first_row)
    for start in range(0, len(x), step):
        yield start, x[start : start + step]


def _by_columns(
    file: pq.ParquetFile, group: int, names: Sequence[str], where: str, *, step: int, first_row: int, scratch: Path
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The same for a row group too large to hold: its columns go through the disk, block by block."""
    rows = file.metadata.row_group(group).num_rows
    columns = column_slices(rows, len(names))
    parts = (list(names[place]) for place in columns)
    tables = (file.read_row_group(group, columns=part).select(part) for part in parts)
    blocks = (_numbers(table, where, first_row=first_row) for table in tables)
    return by_rows(blocks, columns, rows=rows, step=step, scratch=scratch)


def _numbers(table: pa.Table, where: str, *, first_row: int) -> NDArray[np.float32]:
    """Features [n, p] of numeric columns, NaN where null. Raises ``DataError`` for integers that lose digits."""
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        held = column.combine_chunks()
        ready = pa.types.is_float32(held.type) or pa.types.is_float64(held.type)
        columns.append(held if ready else _as_float32(held, name, where, first_row=first_row))
    batch = pa.RecordBatch.from_arrays(columns, names=table.column_names)
    return narrowed(batch.to_tensor(null_to_nan=True, row_major=True).to_numpy())


def _as_float32(column: pa.Array, name: str, where: str, *, first_row: int) -> pa.Array:
    """A column of integers, half floats or nulls only as float32."""
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), pa.float32())
    values = column.fill_null(0).to_numpy(zero_copy_only=False)
    if pa.types.is_integer(column.type):
        lossy = (values > EXACT_INTEGER) | (values < -EXACT_INTEGER)
        refuse_lossy_integers(lossy[:, None], values[:, None], [name], where, first_row=first_row)
    return pa.array(values.astype(np.float32), mask=column.is_null().to_numpy(zero_copy_only=False))


# --- text -----------------------------------------------------------------------------------------------------


def _text(path: Path, modality: str, delimiter: str) -> list[Source]:
    where = shown(path.name)
    header = _header(path, where, delimiter)
    names = _columns(header, where)
    return [Source(modality, where, names, partial(_text_pieces, path, tuple(header), where, delimiter))]


def _header(path: Path, where: str, delimiter: str) -> list[str]:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            return next(text_csv.reader(file, delimiter=delimiter))
    except StopIteration:
        raise DataError(f"{where}: is empty") from None
    except UnicodeDecodeError:
        raise DataError(f"{where}: is not UTF-8 text; save it as UTF-8") from None
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
    """So many rows at most: as numbers, of which several copies are made, short text takes many times its size."""
    for batch in batches:
        yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def _text_batches(stream: pa.NativeFile, header: tuple[str, ...], delimiter: str) -> Iterator[pa.RecordBatch]:
    types = {name: pa.string() if name in META else pa.float64() for name in header}
    wide = min(64 * sum(len(name) + 1 for name in header), WIDE_BLOCK_BYTES)
    longest = 64 * len(header)  # of a line, which a block must hold
    return iter(
        pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(use_threads=False, block_size=max(TEXT_BLOCK_BYTES, wide, longest)),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter),
            convert_options=pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True),
        )
    )


def _numbers_of_text(batch: pa.RecordBatch, where: str, *, first_row: int) -> NDArray[np.float32]:
    """Features [n, p] of parsed columns. Raises ``DataError`` for whole numbers that lose digits."""
    x = batch.to_tensor(null_to_nan=True, row_major=True).to_numpy()
    large = (np.abs(x) > EXACT_INTEGER) & (np.abs(x) < 2**53)
    if large.any():
        lossy = large & (x == np.floor(x)) & (narrowed(x) != x)
        refuse_lossy_integers(lossy, x, batch.schema.names, where, first_row=first_row)
    return narrowed(x)


def _located(error: DataError, header: Sequence[str], where: str) -> DataError:
    """Arrow's column number and line of a bad cell, as the user's column name and line."""
    message = str(error.__cause__ or "")
    if cell := _CELL.search(message):
        name, found = header[int(cell[1])], cell[3].replace("invalid value ", "not a number: ")
        return DataError(f"{where}, line {cell[2]}, column {shown(name)!r}: {shown(found)}")
    if line := _LINE.search(message):
        return DataError(f"{where}, line {line[1]}: {line[2]}")
    return error
