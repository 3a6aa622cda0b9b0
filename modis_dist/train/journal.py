"""The journal of a training: an append-only file of JSON lines with checksums.

The training process writes it; other processes follow it. It is the source of truth for curves, whatever happens to a
tracking server. Independent of MLflow and Ray.

A line is ``{"crc": "<CRC-32 of the record's canonical text, hex>", "record": {...}}``; canonical text is JSON with
sorted keys and no spaces. NaN and infinity, which JSON lacks, are the strings "nan", "inf" and "-inf"; metrics are
floats again when read.
"""

import errno
import json
import logging
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NotRequired, TypedDict

from modis_dist.runtime.files import write_bytes
from modis_dist.train.callbacks import EventKind, Reporter

JOURNAL = "journal.jsonl"


class Record(TypedDict):
    """The metrics of an epoch (``step``) of a trial, or an event."""

    kind: Literal["metrics"] | EventKind
    trial: str
    time_ms: int
    step: NotRequired[int]  # of metrics
    values: dict[str, Any]


class JournalWriter(AbstractContextManager["JournalWriter"]):
    """Appends records to a journal. One writer per file, in an existing folder.

    Every record is one ``os.write`` with O_APPEND, so a killed process leaves at most one torn last line; the next
    writer starts a new line. Records that cannot be written are retried with the next one while training continues;
    raises ``OSError`` if records are still missing at an ``end`` event or on close.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._torn = os.fstat(self._file).st_size > 0  # possibly, by a killed writer; readers skip empty lines

    def metrics(self, trial: str, *, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of one epoch (``step``) of a trial."""
        numbers = {name: float(value) for name, value in values.items()}
        self._append({"kind": "metrics", "trial": trial, "time_ms": _now_ms(), "step": int(step), "values": numbers})

    def event(self, trial: str, *, kind: EventKind, values: Mapping[str, Any]) -> None:
        """Write an event with plain JSON ``values``. An ``end`` is on disk when this returns."""
        self._append({"kind": kind, "trial": trial, "time_ms": _now_ms(), "values": dict(values)})
        if kind == "end":
            self._write()
            os.fsync(self._file)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the journal; an error on closing never hides an earlier one."""
        with suppress(OSError) if kind else nullcontext():
            self.close()

    def close(self) -> None:
        """Flush to disk and close; a second call does nothing."""
        if self._file < 0:
            return
        try:
            self._write()
            os.fsync(self._file)
        finally:
            os.close(self._file)
            self._file = -1

    def _append(self, record: Record) -> None:
        self._waiting.append(_line(record))
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                logging.getLogger(__name__).warning("%s; records are buffered and training continues", error)

    def _write(self) -> None:
        while self._waiting:
            line = b"\n" * self._torn + self._waiting[0]
            self._torn = True
            try:
                written = os.write(self._file, line)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self._path)) from None
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            self._torn = False
            self._waiting.popleft()


class JournalReader:
    """Reads a growing journal incrementally; a missing file is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._seen: set[tuple[str, int]] = set()
        self.skipped = 0  # number of torn or corrupt lines

    def new(self) -> list[Record]:
        """Return the valid records since the last call, whole lines only.

        A resumed training repeats the epochs after its checkpoint, with the same numbers: only the first metrics of a
        trial and step are returned.
        """
        *lines, _unfinished = self._tail().split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines)
        records = [_record(line) for line in lines if line]
        self.skipped += records.count(None)
        return [record for record in records if record is not None and self._is_first(record)]

    def _tail(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                return file.read()
        except FileNotFoundError:
            return b""

    def _is_first(self, record: Record) -> bool:
        if record["kind"] != "metrics":
            return True
        key = (record["trial"], record["step"])
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


def read(path: Path) -> list[Record]:
    """Return all valid records of a journal in the order written; see ``JournalReader``."""
    return JournalReader(path).new()


def report_epochs(records: Iterable[Record], reporter: Reporter, *, epochs: int, epochs_before: int = 0) -> None:
    """Report the epochs of one training in records of its journal, each plus ``epochs_before``."""
    for record in records:
        if record["kind"] == "metrics":
            epoch = epochs_before + record["step"]
            reporter.progress(epoch=epoch, epochs=epochs, active=1, headline=record["values"])


def copy_trial(source: Path, target: Path, *, trial: str) -> None:
    """Copy the valid records of one trial into a new journal; a missing source is empty."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = source.read_bytes().split(b"\n") if source.exists() else []
    trial_lines = [
        line for line in lines if line and (record := _record(line)) is not None and record["trial"] == trial
    ]
    write_bytes(target, b"".join(line + b"\n" for line in trial_lines))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _line(record: Record) -> bytes:
    text = _canonical(_strict(record))
    return f'{{"crc": "{zlib.crc32(text.encode()):08x}", "record": {text}}}\n'.encode()


def _canonical(record: Any) -> str:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _strict(value: Any) -> Any:
    """Return the value with NaN and infinity as strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _record(line: bytes) -> Record | None:
    """Return the record of a line, or None if the line is damaged."""
    try:
        outer = json.loads(line, parse_constant=_refuse)
        record, crc = outer["record"], outer["crc"]
        if crc != f"{zlib.crc32(_canonical(record).encode()):08x}":
            return None
        if record["kind"] == "metrics":
            record["values"] = {name: float(value) for name, value in record["values"].items()}
        valid: Record = record
        return valid
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(constant)
