"""Writes a store row by row: never a whole modality in memory, never half a store at its final path.

Everything is built in a hidden private folder beside the target and renamed into place when all of it is on disk.
Knows the rules of a store but no source format.
"""

import errno
import hashlib
import json
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
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

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
    check_modality,
    folded,
    natural_order,
    spoilt_names,
)
from modis_dist.runtime.errors import DataError, shown
from modis_dist.runtime.files import sync, write_text
from modis_dist.runtime.version import __version__

ROW_GROUP_BYTES = 32 << 20  # 419 rows of 20,000 features
ROW_GROUP_ROWS = 1024
SHARD_BYTES = 256 << 20


def row_group_rows(features: int) -> int:
    """Rows of a row group: 1024, fewer where the rows are wide."""
    return max(1, min(ROW_GROUP_ROWS, ROW_GROUP_BYTES // (4 * features)))


class StoreWriter:
    """Context manager that builds a store at ``out``; an existing path is refused, a failure leaves nothing behind.

    ``source`` is kept in the manifest as the record of where the rows came from.
    """

    def __init__(self, out: Path, *, source: Mapping[str, object]) -> None:
        self.out = out
        self.source = dict(source)
        self.folder = out  # the hidden folder, once entered
        self.notices: list[str] = []
        self._ledger = Ledger()
        self._modalities: dict[str, _Modality] = {}

    def __enter__(self) -> "StoreWriter":
        with writing(self.out):
            self._refuse_existing()
            self.out.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _sweep(self.out)
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
            shutil.rmtree(self.folder, ignore_errors=True)  # gone already where it was renamed

    def begin(self, modality: str, features: Sequence[str], *, where: str | None = None) -> None:
        """Start a modality; ``where`` is what messages call it (its file). Raises ``DataError`` for bad names."""
        check_modality(modality, self._modalities)
        where = where or modality
        check_features(features, where)
        if spoilt := spoilt_names(features):
            names = ", ".join(shown(name) for name in spoilt[:5])
            self.note(f"{where}: {len(spoilt)} feature names look spoilt by a spreadsheet: {names}")
        folder = self.folder / modality
        with writing(self.out):
            folder.mkdir(mode=0o700)
        self._modalities[modality] = _Modality(folder, tuple(features), where)

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
        """Append rows; ``x`` is [n, p] with NaN where a value is missing, ``split`` is train, test or "".

        Raises ``DataError`` for rows that break a rule of the store and for values that are not finite.
        """
        held = self._modalities[modality]
        assert x.dtype == np.float32 and x.shape == (len(sample_id), len(held.features))
        _refuse_infinite(x, sample_id, held, first_row=self._ledger.rows(held.where) + 1)
        self._ledger.add(held.where, sample_id=sample_id, group_id=group_id, label=label, split=split)
        held.missing += int(np.isnan(x).sum())
        with writing(self.out):
            held.append([sample_id, group_id, label, [part or None for part in split]], x)

    def note(self, line: str) -> None:
        """Keep a line for the user in the manifest."""
        self.notices.append(line)

    def _refuse_existing(self) -> None:
        if os.path.lexists(self.out):
            raise DataError(f"{shown(str(self.out))}: exists already; choose another --out or remove it")

    def _finish(self) -> None:
        if not self._modalities:
            raise DataError(f"{shown(str(self.out))}: there is no modality to write")
        tables: dict[str, ModalityTable] = {}
        for name, modality in self._modalities.items():
            tables[name] = modality.finish()
            if not tables[name].rows:
                raise DataError(f"{modality.where}: there are no rows")
        self._add_notices()
        classes = tuple(sorted(self._ledger.labels, key=natural_order))
        write_text(self.folder / MANIFEST, _manifest_text(classes, tables, self._created()))
        sync(self.folder)
        self._refuse_existing()
        self.folder.rename(self.out)
        sync(self.out.parent)

    def _created(self) -> dict[str, Any]:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return {"time": time, "program": f"modis-dist {__version__}", "source": self.source, "notices": self.notices}

    def _add_notices(self) -> None:
        for held in self._modalities.values():
            if held.missing:
                share = held.missing / (held.rows * len(held.features))
                self.note(f"{held.where}: {held.missing:,} values are missing ({share:.2%})")
        first: dict[str, str] = {}
        for label in sorted(self._ledger.labels):
            before = first.setdefault(folded(label), label)
            if before != label:
                self.note(f"classes {shown(before)!r} and {shown(label)!r} differ only by case or spaces")
        if not self._ledger.labels:
            self.note("no row has a label")
        if len(self._modalities) == 1:
            self.note("there is one modality only; training needs two or more")
        elif not self._any_shared_sample():
            self.note("no sample has rows in two modalities; translation cannot be scored")

    def _any_shared_sample(self) -> bool:
        seen: set[str] = set()
        for held in self._modalities.values():
            ids = set(self._ledger.samples(held.where))
            if not seen.isdisjoint(ids):
                return True
            seen |= ids
        return False


class _Modality:
    """The open end of one modality: a buffer of one row group and the shard being written."""

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
        """Buffer rows; every full row group goes to disk."""
        start = 0
        while start < len(x):
            held = len(self._meta[0])
            stop = min(len(x), start + len(self._buffer) - held)
            self._buffer[held : held + stop - start] = x[start:stop]
            for kept, column in zip(self._meta, meta, strict=True):
                kept.extend(column[start:stop])
            start = stop
            if len(self._meta[0]) == len(self._buffer):
                self._write_row_group()

    def finish(self) -> ModalityTable:
        """Write what is buffered and return the manifest's entry."""
        if self._meta[0]:
            self._write_row_group()
        self._close_shard()
        sync(self._folder)
        return ModalityTable(self.features, self.rows, tuple(self._shards))

    def abandon(self) -> None:
        """Let go of the open file after a failure."""
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
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        rows = self.rows - sum(shard.rows for shard in self._shards)
        self._shards.append(Shard(path.name, rows, path.stat().st_size, sha256))


def _refuse_infinite(x: NDArray[np.float32], sample_id: Sequence[str], held: _Modality, *, first_row: int) -> None:
    infinite = np.isinf(x)
    if not infinite.any():
        return
    row, column = np.argwhere(infinite)[0]
    raise DataError(
        f"{held.where}, data row {first_row + row}, sample {shown(sample_id[row])!r}, feature "
        f"{shown(held.features[column])!r}: the value is infinite or beyond 3.4e38 ({infinite.sum()} such values in "
        f"{infinite.any(axis=1).sum()} of {len(x)} rows looked at); leave missing values empty, scale large ones"
    )


def _manifest_text(classes: tuple[str, ...], tables: Mapping[str, ModalityTable], created: Mapping[str, Any]) -> str:
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint_of(classes, tables),
        "created": created,
        "classes": classes,
        "modalities": [{"name": name, **asdict(table)} for name, table in tables.items()],
    }
    return json.dumps(manifest, indent=1, allow_nan=False) + "\n"


# --- files ----------------------------------------------------------------------------------------------------


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """A full disk, a quota or a missing permission is the user's to mend: one line, not a traceback."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another --out"
        raise DataError(f"{shown(str(out))}: cannot be written ({error.strerror}); {advice}") from error


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _hidden_prefix(out: Path) -> str:
    """Says whose the hidden folder is, so that one left by a killed process can be told from one in use."""
    return f".{out.name}.{socket.gethostname()}.{os.getpid()}."


def _sweep(out: Path) -> None:
    """Remove what killed imports to the same target left behind on this machine."""
    host = f".{out.name}.{socket.gethostname()}."
    for left in out.parent.iterdir():
        owner = left.name.removeprefix(host).split(".")[0]
        if left.name.startswith(host) and left.name.endswith(".tmp") and owner.isdecimal() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
