"""Reading of a store: a folder with a manifest and, per modality, Parquet shards of rows with a float32 vector each.

Shards are verified against the checksums of the manifest before rows are read. The only file written here is a cache
of verified shards.
"""

import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
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
from modis_dist.runtime.errors import DataError, nearest
from modis_dist.runtime.files import sha256, write_json
from modis_dist.runtime.text import listed, shown

MANIFEST = "manifest.json"
VERIFIED = ".verified.json"
FORMAT = "modis-dist store"
VERSION = 1
META = ("sample_id", "group_id", "label", "split")
_SHARD_NAME = re.compile(r"part-\d{5,}\.parquet")

Stamp = tuple[int, int]  # size in bytes, modification time in ns


def shard_schema(features: int) -> pa.Schema:
    """Return the Parquet schema of the shards of a modality."""
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
    """The manifest's entry of one modality."""

    features: tuple[str, ...]
    rows: int
    shards: tuple[Shard, ...]


def fingerprint_of(classes: Sequence[str], tables: Mapping[str, ModalityTable]) -> str:
    """Return the SHA-256 of a manifest without its creation record."""
    modalities = [{"name": name, **asdict(table)} for name, table in tables.items()]
    return digest({"version": VERSION, "classes": list(classes), "modalities": modalities})


@dataclass(frozen=True)
class Store:
    """A verified store; create it with ``open``."""

    path: Path
    classes: tuple[str, ...]
    modalities: tuple[str, ...]
    fingerprint: str
    tables: Mapping[str, ModalityTable] = field(repr=False)
    created: Mapping[str, Any] = field(repr=False)  # time, program, source, notices
    stamps: Mapping[str, Stamp] = field(repr=False)  # of every shard when it was verified

    @classmethod
    def open(cls, path: Path, *, cached: bool = True) -> "Store":
        """Open a store and verify size, content and schema of every shard.

        If ``cached``, shards whose size and modification time match an earlier verification are not hashed again (that
        requires a writable folder). Raises ``DataError``.
        """
        return _open(path, trusted=_read_verified(path) if cached else {})

    @property
    def notices(self) -> tuple[str, ...]:
        """Notices of the import."""
        return tuple(str(line) for line in self.created.get("notices", ()))

    def table(self, modality: str) -> ModalityTable:
        """Return the manifest's entry. Raises ``DataError`` for an unknown modality."""
        if modality not in self.tables:
            hint = nearest(modality, list(self.modalities)) or f"; known: {', '.join(self.modalities)}"
            raise DataError(f"{shown(str(self.path))}: unknown modality {shown(modality)!r}{hint}")
        return self.tables[modality]

    def features(self, modality: str) -> tuple[str, ...]:
        """Return the feature names, in column order."""
        return self.table(modality).features

    def rows(self, modality: str) -> int:
        """Return the number of rows."""
        return self.table(modality).rows

    def edges(self, modality: str) -> NDArray[np.int64]:
        """Return the first row of every row group, then the number of rows; shape [row groups + 1]."""
        table, sizes = self.table(modality), [0]
        for shard in table.shards:
            file_path = self.path / modality / shard.name
            with _reading_shard(file_path):
                metadata = _parquet(file_path, shard, features=len(table.features)).metadata
                sizes += [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        return np.cumsum(sizes, dtype=np.int64)

    def index(self, modality: str) -> Index:
        """Return the metadata of all rows of a modality."""
        parts = [self._index(table) for _, table in self._row_groups(modality, columns=META)]
        return Index(*(np.concatenate([getattr(part, name) for part in parts]) for name in META))

    def read(self, modality: str, rows: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Return features [n, p] of all rows, or of ``rows`` in their order; reads only the row groups needed.

        Raises ``DataError`` for a wrong page checksum, ``IndexError`` for a row that does not exist.
        """
        table = self.table(modality)
        assert rows is None or rows.dtype.kind == "i"  # a mask would be read as rows 0 and 1
        positions = np.arange(table.rows) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= table.rows):
            raise IndexError(f"{modality} has rows 0 to {table.rows - 1}; got {positions.min()} to {positions.max()}")
        order = np.argsort(positions, kind="stable")
        ordered = positions[order]
        x = np.empty((len(positions), len(table.features)), dtype=np.float32)
        for start, group in self._row_groups(modality, columns=("features",), positions=ordered):
            first, last = np.searchsorted(ordered, [start, start + group.num_rows])
            x[order[first:last]] = _vectors(group)[ordered[first:last] - start]
        return x

    def batches(self, modality: str) -> Iterator[tuple[Index, NDArray[np.float32]]]:
        """Yield metadata and features of every row group."""
        for _, group in self._row_groups(modality, columns=(*META, "features")):
            yield self._index(group), _vectors(group)

    def _row_groups(
        self, modality: str, *, columns: Sequence[str], positions: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[int, pa.Table]]:
        """Yield first row and content of the row groups, or of those with rows in ``positions`` (ascending)."""
        start, table = 0, self.table(modality)
        for shard in table.shards:
            if not _overlaps(positions, start, shard.rows):
                start += shard.rows
                continue
            file_path = self.path / modality / shard.name
            with _reading_shard(file_path):
                if _stamp(file_path) != self.stamps[f"{modality}/{shard.name}"]:
                    raise DataError(f"{shown(str(file_path))}: modified after the store was opened; rerun the command")
                file = _parquet(file_path, shard, features=len(table.features))
                for number in range(file.num_row_groups):
                    rows = file.metadata.row_group(number).num_rows
                    if _overlaps(positions, start, rows):
                        group = file.read_row_group(number, columns=list(columns))
                        if group.num_rows != rows:
                            raise ValueError(f"row group {number} has {group.num_rows} rows, expected {rows}")
                        yield start, group
                    start += rows

    def _index(self, table: pa.Table) -> Index:
        label = table["label"]
        codes = pc.index_in(label, value_set=pa.array(self.classes, pa.string()), skip_nulls=True)
        if codes.null_count != label.null_count:
            raise DataError(
                f"{shown(str(self.path))}: a shard has a label that is not a class of the manifest; repeat the import"
            )
        return Index(
            _strings(table["sample_id"]),
            _strings(table["group_id"]),
            pc.fill_null(codes, UNLABELLED).to_numpy().astype(np.int64),
            _strings(pc.fill_null(table["split"], "")),
        )


# --- reading shards -------------------------------------------------------------------------------------------


def _parquet(path: Path, shard: Shard, *, features: int) -> pq.ParquetFile:
    """Open a shard and check its schema and number of rows."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    if file.schema_arrow != shard_schema(features) or file.metadata.num_rows != shard.rows:
        raise DataError(f"{shown(str(path))}: schema or number of rows differs from the manifest; repeat the import")
    return file


def _vectors(table: pa.Table) -> NDArray[np.float32]:
    """Return the features as [n, p], without a copy if the column has one chunk."""
    chunks = [chunk.to_numpy_ndarray() for chunk in table["features"].chunks]
    x: NDArray[np.float32] = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
    return x


def _strings(column: pa.ChunkedArray) -> NDArray[np.object_]:
    return np.array(column.to_pylist(), dtype=object)


def _overlaps(positions: NDArray[np.int64] | None, start: int, rows: int) -> bool:
    if positions is None:
        return True
    first, last = np.searchsorted(positions, [start, start + rows])
    return bool(first < last)


@contextmanager
def reading(where: str, *, advice: str = "") -> Iterator[None]:
    """Convert the errors that libraries raise for damaged files to a ``DataError`` that names the file."""
    try:
        yield
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, EOFError, pa.ArrowException) as error:
        raise DataError(f"{where}: cannot be read ({shown(str(error))}){advice}") from error


def _reading_shard(path: Path) -> AbstractContextManager[None]:
    return reading(shown(str(path)), advice="; restore the file or repeat the import")


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{shown(str(path))}: not a regular file; restore it or repeat the import")
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
        with suppress(OSError):  # a read-only folder
            write_json(path / VERIFIED, verified)
    return Store(path, manifest["classes"], tuple(tables), manifest["fingerprint"], tables, manifest["created"], stamps)


def _manifest(path: Path) -> dict[str, Any]:
    """Read the manifest. Raises ``DataError`` if it is missing, damaged or of another format version."""
    file = path / MANIFEST
    where = shown(str(file))
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["format"] != FORMAT:
            raise ValueError("not the manifest of a store")
        if raw.get("version") != VERSION:
            version = shown(raw.get("version"))
            raise DataError(f"{where}: format version {version}, expected {VERSION}; repeat the import")
        tables = {entry["name"]: _table(entry) for entry in raw["modalities"]}
        classes = tuple(raw["classes"])
        if fingerprint_of(classes, tables) != raw["fingerprint"] or len(tables) != len(raw["modalities"]):
            raise ValueError("wrong fingerprint")
        created, fingerprint = dict(raw["created"]), raw["fingerprint"]
        return {"tables": tables, "classes": classes, "fingerprint": fingerprint, "created": created}
    except DataError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{shown(str(path))}: not a store (no {MANIFEST}); create one with `modis-dist data import`"
        ) from None
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{where}: damaged ({shown(str(error))}); restore it or repeat the import") from error


def _table(entry: dict[str, Any]) -> ModalityTable:
    check_modality(entry["name"], ())
    shards = tuple(Shard(**shard) for shard in entry["shards"])
    if not all(_SHARD_NAME.fullmatch(shard.name) for shard in shards):
        raise ValueError("invalid shard name")
    if sum(shard.rows for shard in shards) != entry["rows"]:
        raise ValueError("wrong sum of shard rows")
    return ModalityTable(tuple(entry["features"]), entry["rows"], shards)


def _stamps(path: Path, shards: Mapping[str, Shard]) -> dict[str, Stamp]:
    """Return size and modification time of every shard. Raises one ``DataError`` for all missing or incomplete ones."""
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
        raise DataError(
            f"{shown(str(path))}: {len(wrong)} of {len(shards)} shards are missing or incomplete: {listed(wrong)}; "
            "restore them or repeat the import"
        )
    return stamps


def _verify_shard(path: Path, shard: Shard, *, features: int) -> None:
    with _reading_shard(path):
        checksum = sha256(path)
        if checksum != shard.sha256:
            raise DataError(
                f"{shown(str(path))}: modified since the import (SHA-256 {checksum[:12]}..., expected "
                f"{shard.sha256[:12]}...); restore the file or repeat the import"
            )
        _parquet(path, shard, features=features)


def _read_verified(path: Path) -> dict[str, Any]:
    """Return size, time and hash of the shards verified earlier; empty if unknown."""
    try:
        verified = json.loads((path / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return verified if isinstance(verified, dict) else {}
