"""A store: a folder with a manifest and, per modality, Parquet shards of rows with one float32 vector each.

This is the read-only side: what the manifest says, whether the shards are the ones it names, and rows as contiguous
arrays. Nothing read here is trusted before its checksum agrees. Knows no source format and writes nothing but its
own cache of verified shards.
"""

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from modis_dist.config.parse import digest
from modis_dist.data.store.index import UNLABELLED, Index
from modis_dist.data.store.rules import check_modality
from modis_dist.runtime.errors import DataError, nearest, shown

MANIFEST = "manifest.json"
VERIFIED = ".verified.json"
FORMAT = "modis-dist store"
VERSION = 1
META = ("sample_id", "group_id", "label", "split")
_SHARD_NAME = re.compile(r"part-\d{5,}\.parquet")

Stamp = tuple[int, int]  # size in bytes, modification time in ns


def shard_schema(features: int) -> pa.Schema:
    """The columns of every shard of a modality with so many features."""
    required = [("sample_id", False), ("group_id", False), ("label", True), ("split", True)]
    columns = [pa.field(name, pa.string(), nullable=nullable) for name, nullable in required]
    return pa.schema([*columns, pa.field("features", pa.fixed_shape_tensor(pa.float32(), [features]), nullable=False)])


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a modality."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ModalityTable:
    """What the manifest says of one modality."""

    features: tuple[str, ...]
    rows: int
    shards: tuple[Shard, ...]


def fingerprint_of(classes: Sequence[str], tables: Mapping[str, ModalityTable]) -> str:
    """SHA-256 of everything in a manifest that defines the data; the time and place of its making do not."""
    named = [{"name": name, **asdict(table)} for name, table in tables.items()]
    return digest({"version": VERSION, "classes": list(classes), "modalities": named})


@dataclass(frozen=True)
class Store:
    """A verified store; ``open`` is the way to get one."""

    path: Path
    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    fingerprint: str
    tables: Mapping[str, ModalityTable] = field(repr=False)
    created: Mapping[str, Any] = field(repr=False)  # time, program, source, notices
    stamps: Mapping[str, Stamp] = field(repr=False)  # by shard, at the moment it was verified

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Open the store in a folder: every shard is there, of the right size, content and schema.

        A shard whose size and modification time are those of an earlier verification is not hashed again where
        the folder could keep that record. Raises ``DataError``.
        """
        return _open(path, trusted=_read_verified(path))

    @classmethod
    def open_unseen(cls, path: Path) -> "Store":
        """As ``open``, with every shard hashed now, whatever was verified before."""
        return _open(path, trusted={})

    @property
    def notices(self) -> tuple[str, ...]:
        """What the importer found worth telling."""
        return tuple(str(line) for line in self.created.get("notices", ()))

    def table(self, modality: str) -> ModalityTable:
        """The manifest's entry. Raises ``DataError`` for an unknown modality."""
        if modality not in self.tables:
            hint = nearest(modality, list(self.modalities)) or f"; it has {', '.join(self.modalities)}"
            raise DataError(f"{shown(str(self.path))}: there is no modality {shown(modality)!r}{hint}")
        return self.tables[modality]

    def features(self, modality: str) -> tuple[str, ...]:
        """Feature names, in column order."""
        return self.table(modality).features

    def rows(self, modality: str) -> int:
        """Number of rows."""
        return self.table(modality).rows

    def edges(self, modality: str) -> NDArray[np.int64]:
        """The first row of every row group and, at the end, the number of rows; shape [row groups + 1]."""
        table, sizes = self.table(modality), [0]
        for shard in table.shards:
            file_path = self.path / modality / shard.name
            with _reading(file_path):
                held = _parquet(file_path, shard, features=len(table.features)).metadata
                sizes += [held.row_group(number).num_rows for number in range(held.num_row_groups)]
        return np.cumsum(sizes, dtype=np.int64)

    def index(self, modality: str) -> Index:
        """Everything but the features, for all rows of a modality."""
        parts = [self._index(table) for _, table in self._row_groups(modality, columns=META)]
        return Index(
            np.concatenate([part.sample_id for part in parts]),
            np.concatenate([part.group_id for part in parts]),
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.split for part in parts]),
        )

    def read(self, modality: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Features [n, p] of all rows, or of ``rows`` in their order; only the row groups that hold them are read.

        Raises ``DataError`` where a page's checksum disagrees, ``IndexError`` for a row that does not exist.
        """
        table = self.table(modality)
        assert rows is None or rows.dtype.kind == "i"  # a mask would pass for rows 0 and 1
        wanted = np.arange(table.rows) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= table.rows):
            raise IndexError(f"{modality} has rows 0 to {table.rows - 1}; got {wanted.min()} to {wanted.max()}")
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        x = np.empty((len(wanted), len(table.features)), dtype=np.float32)
        for start, group in self._row_groups(modality, columns=("features",), wanted=ordered):
            first, last = np.searchsorted(ordered, [start, start + group.num_rows])
            x[order[first:last]] = _vectors(group)[ordered[first:last] - start]
        return x

    def batches(self, modality: str) -> Iterator[tuple[Index, NDArray[np.float32]]]:
        """Metadata and features of one row group after another; memory is bounded by a row group."""
        for _, group in self._row_groups(modality, columns=(*META, "features")):
            yield self._index(group), _vectors(group)

    def _row_groups(
        self, modality: str, *, columns: Sequence[str], wanted: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """First row and content of each row group, or of those that hold a row of the ascending ``wanted``."""
        start, table = 0, self.table(modality)
        for shard in table.shards:
            if not _overlaps(wanted, start, shard.rows):
                start += shard.rows
                continue
            file_path = self.path / modality / shard.name
            with _reading(file_path):
                if _stamp(file_path) != self.stamps[f"{modality}/{shard.name}"]:
                    raise DataError(
                        f"{shown(str(file_path))}: the file changed after the store was opened; start again"
                    )
                file = _parquet(file_path, shard, features=len(table.features))
                for number in range(file.num_row_groups):
                    rows = file.metadata.row_group(number).num_rows
                    if _overlaps(wanted, start, rows):
                        yield start, _checked(file.read_row_group(number, columns=list(columns)), rows)
                    start += rows

    def _index(self, table: pa.Table) -> Index:
        label = table["label"]
        codes = pc.index_in(label, value_set=pa.array(self.classes, pa.string()), skip_nulls=True)
        if codes.null_count != label.null_count:
            raise DataError(
                f"{shown(str(self.path))}: a shard has a label that is not among the manifest's classes; import again"
            )
        return Index(
            _strings(table["sample_id"]),
            _strings(table["group_id"]),
            pc.fill_null(codes, UNLABELLED).to_numpy().astype(np.int64),
            _strings(pc.fill_null(table["split"], "")),
        )


# --- reading shards -------------------------------------------------------------------------------------------


def _parquet(path: Path, shard: Shard, *, features: int) -> pq.ParquetFile:
    """The opened shard, its columns and rows compared with what they must be."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    if file.schema_arrow != shard_schema(features) or file.metadata.num_rows != shard.rows:
        raise DataError(f"{shown(str(path))}: columns or rows are not those of the manifest; import again")
    return file


def _vectors(table: pa.Table) -> NDArray[np.float32]:
    """The tensor column as [n, p], without a copy where Arrow has it in one piece."""
    chunks = [chunk.to_numpy_ndarray() for chunk in table["features"].chunks]
    x: NDArray[np.float32] = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return x


def _strings(column: pa.ChunkedArray) -> NDArray[np.object_]:
    return np.array(column.to_pylist(), dtype=object)


def _overlaps(wanted: NDArray[np.int64] | None, start: int, rows: int) -> bool:
    if wanted is None:
        return True
    first, last = np.searchsorted(wanted, [start, start + rows])
    return bool(first < last)


def _checked(table: pa.Table, rows: int) -> pa.Table:
    if table.num_rows != rows:
        raise ValueError(f"a row group has {table.num_rows} rows instead of {rows}")
    return table


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever Arrow raises on a damaged file, as one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(
            f"{shown(str(path))}: cannot be read ({shown(str(error))}); restore it or import again"
        ) from error


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{shown(str(path))}: is not a regular file; restore it or import again")
    return status.st_size, status.st_mtime_ns


# --- opening --------------------------------------------------------------------------------------------------


def _open(path: Path, *, trusted: Mapping[str, Any]) -> Store:
    manifest = _manifest(path)
    tables: dict[str, ModalityTable] = manifest["tables"]
    shards = {f"{name}/{shard.name}": (shard, table) for name, table in tables.items() for shard in table.shards}
    stamps = _stamps(path, {key: shard for key, (shard, _) in shards.items()})
    verified = {key: [*stamps[key], shard.sha256] for key, (shard, _) in shards.items()}
    for key, (shard, table) in shards.items():
        if trusted.get(key) != verified[key]:
            _verify_shard(path / key, shard, features=len(table.features))
    if trusted != verified:
        _write_verified(path, verified)
    return Store(path, manifest["classes"], tuple(tables), manifest["fingerprint"], tables, manifest["created"], stamps)


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest's content as values of this module. Raises ``DataError`` where it is absent, foreign or damaged."""
    file = path / MANIFEST
    where = shown(str(file))
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise KeyError("format")
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{shown(str(path))}: is not a store (no {MANIFEST}); make one with `modis-dist data import`"
        ) from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: is damaged or not a manifest of a store; restore it or import again") from error
    if raw.get("version") != VERSION:
        raise DataError(
            f"{where}: version {shown(raw.get('version'))} cannot be read by this program (it knows {VERSION})"
        )
    return _parsed(raw, where)


def _parsed(raw: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        tables = {entry["name"]: _table(entry) for entry in raw["modalities"]}
        classes = tuple(raw["classes"])
        if fingerprint_of(classes, tables) != raw["fingerprint"] or len(tables) != len(raw["modalities"]):
            raise ValueError("the fingerprint disagrees")
        created = dict(raw["created"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: is damaged ({shown(str(error))}); restore it or import again") from error
    return {"tables": tables, "classes": classes, "fingerprint": raw["fingerprint"], "created": created}


def _table(entry: dict[str, Any]) -> ModalityTable:
    check_modality(entry["name"], ())
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    if not all(_SHARD_NAME.fullmatch(shard.name) for shard in shards):
        raise ValueError("a shard has a name that no shard has")
    if sum(shard.rows for shard in shards) != entry["rows"]:
        raise ValueError("the rows of the shards do not add up")
    return ModalityTable(tuple(entry["features"]), entry["rows"], shards)


def _stamps(path: Path, shards: Mapping[str, Shard]) -> dict[str, Stamp]:
    """Size and time of every shard; all that are absent or of another size are named together."""
    stamps: dict[str, Stamp] = {}
    wrong: list[str] = []
    for key, shard in shards.items():
        try:
            stamps[key] = _stamp(path / key)
        except OSError as error:
            wrong.append(f"{key} ({'missing' if isinstance(error, FileNotFoundError) else error.strerror})")
            continue
        if stamps[key][0] != shard.bytes:
            wrong.append(f"{key} ({stamps[key][0]} of {shard.bytes} bytes)")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DataError(
            f"{shown(str(path))}: {len(wrong)} of {len(shards)} shards are missing or incomplete: "
            f"{', '.join(wrong[:5])}{more}; restore them or import again"
        )
    return stamps


def _verify_shard(path: Path, shard: Shard, *, features: int) -> None:
    with _reading(path):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise DataError(
                f"{shown(str(path))}: the content changed since the import (SHA-256 {found[:12]}..., the manifest says "
                f"{shard.sha256[:12]}...); restore it or import again"
            )
        _parquet(path, shard, features=features)


def _read_verified(path: Path) -> dict[str, Any]:
    """Which shards were verified with which size, time and hash; nothing where that is not known."""
    try:
        held = json.loads((path / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return held if isinstance(held, dict) else {}


def _write_verified(path: Path, verified: Mapping[str, Any]) -> None:
    """Keep the record where the folder is writable; several processes may do so at once."""
    with suppress(OSError):
        handle, name = tempfile.mkstemp(prefix=VERIFIED, dir=path)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(verified, file)
        Path(name).replace(path / VERIFIED)
