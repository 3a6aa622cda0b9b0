"""Import, check and reading of a wide store, compared with pyarrow and the disk; training from memory and from disk.

A table of random values (rows x features x 4 bytes) is written to a temporary folder, which needs four times that
space, and imported. Every command and training runs in a separate process. Readers are interleaved in alternating
order, each once with the store's files evicted from the page cache (cold) and once with them in it (warm); times are
medians. For our readers `baseline_ms` is pyarrow's time in the same cache state. MB are uncompressed values; `of_disk`
is the time of reading the files' bytes divided by the reader's. `peak_MiB` is the total memory of a process, `own_MiB`
excludes file pages, which the system can reclaim. `others` is the number of cores that other processes used.

    python -m tools.bench import
    python -m tools.bench import --rows 100000 --features 20000 --feature-storage disk --folder /scratch
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow.parquet as pq

from modis_dist.data.store.arrays import slices
from modis_dist.data.store.reader import Store
from modis_dist.data.store.stored_rows import StoredRows
from tools.bench.data_work import WIDE, alone, command, make_source, train
from tools.bench.measure import Row, Watch

CHUNK = 16 << 20  # bytes per read


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options: size of the data, feature storage, and the training."""
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the table (default 20000)")
    parser.add_argument("--features", type=int, default=4_000, help="features of the table (default 4000)")
    parser.add_argument("--row-group-rows", type=int, default=5_000, help="rows per row group of the source")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder")
    parser.add_argument("--turns", type=int, default=3, help="turns of the readers")
    parser.add_argument(
        "--feature-storage",
        nargs="*",
        default=["memory", "disk"],
        help="values of trainer.feature_storage to train with",
    )
    parser.add_argument("--width", type=int, default=200, help="hidden width of the wide modality")
    parser.add_argument("--batch", type=int, default=32, help="rows of each modality in a batch")
    parser.add_argument("--steps", type=int, default=100, help="steps of each training")


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each command, reader and training."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        source, folder = Path(name) / "source", Path(name) / "store"
        source.mkdir()
        alone(make_source, source, arguments.rows, arguments.features, arguments.row_group_rows)
        for words in (("import", source, "--out", folder), ("check", folder), ("describe", folder)):
            watch = Watch()
            row = {"work": f"data {words[0]}"} | command(*words)
            yield _with_rates(row, arguments) | {"others": watch.others()}
        store = Store.open(folder)
        yield from _reading(store, arguments)
        os.environ["TMPDIR"] = name
        for storage in arguments.feature_storage:
            watch = Watch()
            measured = alone(train, folder, storage, arguments.width, arguments.batch, arguments.steps)
            yield {"work": f"train, {storage}", "batch": arguments.batch} | measured | {"others": watch.others()}


def _with_rates(row: Row, arguments: argparse.Namespace) -> Row:
    values = arguments.rows * arguments.features
    seconds = row["ours_ms"] / 1000
    return row | {"rows_s": arguments.rows / seconds, "MB_s": 4e-6 * values / seconds}


# --- readers --------------------------------------------------------------------------------------------------


def _reading(store: Store, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row for each reader, cold and warm."""
    files = [store.path / WIDE / shard.name for shard in store.table(WIDE).shards]
    readers: dict[str, Callable[[], None]] = {
        "disk": lambda: _read_bytes(files),
        "pyarrow": lambda: _read_row_groups(files),
        "Store.batches": lambda: _exhaust(store.batches(WIDE)),
        "Store.read": lambda: _exhaust(store.read(WIDE, span) for span in _spans(store)),
        "as a training reads": lambda: _read_blocks(store),
    }
    times: dict[tuple[str, str], list[float]] = {}
    watch = Watch()
    for turn in range(arguments.turns):
        for name in list(readers)[:: -1 if turn % 2 else 1]:
            _drop(files)
            for cache in ("cold", "warm"):
                begin = time.perf_counter()
                readers[name]()
                times.setdefault((name, cache), []).append(time.perf_counter() - begin)
    others = watch.others()
    for (name, cache), measured in sorted(
        times.items(), key=lambda item: (item[0][1], list(readers).index(item[0][0]))
    ):
        seconds, plain = median(measured), median(times["pyarrow", cache])
        row: Row = {"work": f"{name}, {cache}", "ours_ms": 1e3 * seconds}
        if name not in ("disk", "pyarrow"):
            row |= {"baseline_ms": 1e3 * plain, "ratio": plain / seconds}
        yield _with_rates(row, arguments) | {"of_disk": median(times["disk", cache]) / seconds, "others": others}


def _drop(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _read_row_groups(files: list[Path]) -> None:
    """Read with plain pyarrow and its defaults, without checksums."""
    for path in files:
        file = pq.ParquetFile(path)
        for number in range(file.num_row_groups):
            file.read_row_group(number, columns=["features"])


def _spans(store: Store) -> Iterator[np.ndarray]:
    """Yield the rows of each shard."""
    start = 0
    for shard in store.table(WIDE).shards:
        yield np.arange(start, start + shard.rows)
        start += shard.rows


def _read_blocks(store: Store) -> None:
    rows = StoredRows(store, WIDE)
    _exhaust(rows[block] for block in slices(*rows.shape))


def _exhaust(parts: Iterator[object]) -> None:
    for _ in parts:
        pass
