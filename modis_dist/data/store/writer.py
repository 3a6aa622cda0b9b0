"""Writing of a store, with one row group in memory at a time.

The store is written to a hidden private folder beside the target and renamed when it is complete on disk.
"""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from psutil import pid_exists

from modis_dist.data.store.reader import (
    FORMAT,
    MANIFEST,
    VERSION,
    ModalityTable,
    Shard,
    fingerprint_of,
    shard_schema,
)
from modis_dist.data.store.rules import (
    Ledger,
    check_features,
    check_finite,
    check_modality,
    converted_names,
    folded,
    natural_order,
)
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import sha256, sync, write_json
from modis_dist.runtime.text import listed, shown
from modis_dist.runtime.version import __version__

ROW_GROUP_BYTES = 32 << 20  # 419 rows of 20,000 features
ROW_GROUP_ROWS = 1024
SHARD_BYTES = 256 << 20


def row_group_rows(features: int) -> int:
    """Return the rows per row group: 1024, or fewer for wide rows."""
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // (4 * features)))


class StoreWriter:
    """Context manager that writes a store at ``out``, which must not exist; a failure leaves nothing behind.

    ``source`` is the record of the origin of the rows, saved in the manifest.
    """

    def __init__(self, out: Path, *, source: Mapping[str, object]) -> None:
        self.out = out
        self.source = dict(source)
        self.folder = out  # the hidden folder, after __enter__
        self.notices: list[str] = []
        self._ledger = Ledger()
        self._modalities: dict[str, _ModalityWriter] = {}

    def __enter__(self) -> "StoreWriter":
        with writing(self.out):
            self._refuse_existing()
            self.out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _remove_leftovers(self.out)
            self.folder = Path(tempfile.mkdtemp(prefix=_hidden_prefix(self.out), suffix=".tmp", dir=self.out.parent))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with writing(self.out):
                    self._finish()
        finally:
            for modality in self._modalities.values():
                modality.abandon()
            shutil.rmtree(self.folder, ignore_errors=True)  # does not exist after the rename

    def begin(self, modality: str, features: Sequence[str], *, where: str | None = None) -> None:
        """Start a modality; messages call it ``where`` (its file). Raises ``DataError`` for invalid names."""
        check_modality(modality, self._modalities)
        where = where or modality
        check_features(features, where)
        if converted := converted_names(features):
            self.note(f"{where}: {len(converted)} feature names look converted by a spreadsheet: {listed(converted)}")
        folder = self.folder / modality
        with writing(self.out):
            folder.mkdir(mode=0o700)
        self._modalities[modality] = _ModalityWriter(folder, tuple(features), where)

    def write(
        self,
        modality: str,
        *,
        sample_id: Sequence[str],
        group_id: Sequence[str],
        label: Sequence[str | None],
        split: Sequence[str],
        x: NDArray[np.float32],
    ) -> None:
        """Append rows; ``x`` is [n, p] with NaN for missing values, ``split`` is train, test or "".

        Raises ``DataError`` for rows that violate a rule of the store and for infinite values.
        """
        target = self._modalities[modality]
        assert x.dtype == np.float32 and x.shape == (len(sample_id), len(target.features))
        check_finite(x, sample_id, target.features, target.where, first_row=self._ledger.rows(target.where) + 1)
        self._ledger.add(target.where, sample_id=sample_id, group_id=group_id, label=label, split=split)
        target.missing += int(np.isnan(x).sum())
        with writing(self.out):
            target.append([sample_id, group_id, label, [part or None for part in split]], x)

    def note(self, line: str) -> None:
        """Add a notice for the user to the manifest."""
        self.notices.append(line)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.out):
            raise DataError(f"{shown(str(self.out))}: already exists; choose another --out or remove it")

    def _finish(self) -> None:
        if not self._modalities:
            raise DataError(f"{shown(str(self.out))}: no modality to write")
        tables: dict[str, ModalityTable] = {}
        for name, modality in self._modalities.items():
            tables[name] = modality.finish()
            if not tables[name].rows:
                raise DataError(f"{modality.where}: no rows")
        self._add_notices()
        time = datetime.now(UTC).isoformat(timespec="seconds")
        classes = tuple(sorted(self._ledger.labels, key=natural_order))
        program = f"modis-dist {__version__}"
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": fingerprint_of(classes, tables),
            "created": {"time": time, "program": program, "source": self.source, "notices": self.notices},
            "classes": classes,
            "modalities": [{"name": name, **asdict(table)} for name, table in tables.items()],
        }
        write_json(self.folder / MANIFEST, manifest)
        sync(self.folder)
        self._refuse_existing()
        self.folder.rename(self.out)
        sync(self.out.parent)

    def _add_notices(self) -> None:
        for modality in self._modalities.values():
            if modality.missing:
                fraction = modality.missing / (modality.rows * len(modality.features))
                self.note(f"{modality.where}: {modality.missing:,} missing value(s) ({fraction:.2%})")
        by_folded: dict[str, str] = {}
        for label in sorted(self._ledger.labels):
            before = by_folded.setdefault(folded(label), label)
            if before != label:
                self.note(f"classes {shown(before)!r} and {shown(label)!r} differ only by case or spaces")
        if not self._ledger.labels:
            self.note("no labelled rows")
        if len(self._modalities) == 1:
            self.note("only one modality; training needs at least two")
        samples = [sample for m in self._modalities.values() for sample in self._ledger.samples(m.where)]
        if len(self._modalities) > 1 and len(set(samples)) == len(samples):
            self.note("no sample has rows in two modalities; translation cannot be evaluated")


class _ModalityWriter:
    """Writer of one modality: a buffer of one row group and the open shard."""

    def __init__(self, folder: Path, features: tuple[str, ...], where: str) -> None:
        self.features = features
        self.where = where
        self.rows = 0
        self.missing = 0
        self._folder = folder
        self._schema = shard_schema(len(features))
        self._buffer = np.empty((row_group_rows(len(features)), len(features)), dtype=np.float32)
        self._meta: list[list[str | None]] = [[], [], [], []]
        self._groups_per_shard = max(1, SHARD_BYTES // self._buffer.nbytes)
        self._file: IO[bytes] | None = None
        self._parquet: pq.ParquetWriter | None = None
        self._groups = 0
        self._shards: list[Shard] = []

    def append(self, meta: Sequence[Sequence[str | None]], x: NDArray[np.float32]) -> None:
        """Buffer rows and write every full row group."""
        start = 0
        while start < len(x):
            buffered = len(self._meta[0])
            stop = min(len(x), start + len(self._buffer) - buffered)
            self._buffer[buffered : buffered + stop - start] = x[start:stop]
            for values, column in zip(self._meta, meta, strict=True):
                values.extend(column[start:stop])
            start = stop
            if len(self._meta[0]) == len(self._buffer):
                self._write_row_group()

    def finish(self) -> ModalityTable:
        """Write the buffered rows and return the manifest's entry."""
        if self._meta[0]:
            self._write_row_group()
        self._close_shard()
        sync(self._folder)
        return ModalityTable(self.features, self.rows, tuple(self._shards))

    def abandon(self) -> None:
        """Close the open file after a failure."""
        with suppress(OSError, ValueError, pa.ArrowException):
            if self._parquet is not None:
                self._parquet.close()
        with suppress(OSError, ValueError):
            if self._file is not None:
                self._file.close()

    def _write_row_group(self) -> None:
        rows, width = len(self._meta[0]), len(self.features)
        storage = pa.FixedSizeListArray.from_arrays(pa.array(self._buffer[:rows].reshape(-1)), width)
        vectors = pa.ExtensionArray.from_storage(self._schema.field("features").type, storage)
        columns = [pa.array(column, pa.string()) for column in self._meta]
        self._open_shard().write_table(
            pa.Table.from_arrays([*columns, vectors], schema=self._schema), row_group_size=rows
        )
        self._meta = [[], [], [], []]
        self.rows += rows
        self._groups += 1
        if self._groups == self._groups_per_shard:
            self._close_shard()

    def _open_shard(self) -> pq.ParquetWriter:
        if self._parquet is None:
            self._file = _create(self._folder / f"part-{len(self._shards):05d}.parquet")
            self._parquet = pq.ParquetWriter(
                self._file,
                self._schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=["label", "split"],
                column_encoding={"features.list.element": "BYTE_STREAM_SPLIT"},
                write_statistics=False,
                write_page_checksum=True,
            )
        return self._parquet

    def _close_shard(self) -> None:
        if self._parquet is None or self._file is None:
            return
        self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._parquet = self._file = None
        self._groups = 0
        path = self._folder / f"part-{len(self._shards):05d}.parquet"
        rows = self.rows - sum(shard.rows for shard in self._shards)
        self._shards.append(Shard(path.name, rows, path.stat().st_size, sha256(path)))


# --- files ----------------------------------------------------------------------------------------------------


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Convert an ``OSError`` (disk full, quota, permissions) to a ``DataError`` with advice."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        advice = "free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another --out"
        raise DataError(f"{shown(str(out))}: cannot be written ({error.strerror}); {advice}") from error


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _hidden_prefix(out: Path) -> str:
    """Return the prefix of the hidden folder, with host and process id, to recognise folders of killed processes."""
    return f".{out.name}.{socket.gethostname()}.{os.getpid()}."


def _remove_leftovers(out: Path) -> None:
    """Remove the hidden folders that killed imports to the same target left on this host."""
    host = f".{out.name}.{socket.gethostname()}."
    for path in out.parent.iterdir():
        pid = path.name.removeprefix(host).split(".")[0]
        if path.name.startswith(host) and path.name.endswith(".tmp") and pid.isdecimal() and not pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
