"""Work of the measurements of large data: each runs in a separate process and returns its time and memory."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from modis_dist.config import parse
from modis_dist.config.run import Run
from modis_dist.data.store.reader import Store
from modis_dist.runtime.errors import Interrupted
from modis_dist.train.callbacks import Callbacks
from modis_dist.train.loader import Loader
from modis_dist.train.loop import fit
from modis_dist.train.placement import storage_of
from modis_dist.train.prepare import load_cohort, prepare
from modis_dist.train.stack import Member

Row = dict[str, Any]

CLASSES = 10
WIDE, NARROW, NARROW_FEATURES = "wide", "narrow", 50
MIB = 2**20
SAMPLING_S = 0.02

# Prints its own peak at exit: the peak that the system reports for a child includes its parent's memory.
COMMAND = """
import atexit, sys
from modis_dist.cli.data import app

def print_peak():
    lines = open("/proc/self/status").read().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")), file=sys.stderr)

atexit.register(print_peak)
app()
"""


# --- processes ------------------------------------------------------------------------------------------------


def alone(work: Callable[..., Row], *arguments: object) -> Row:
    """Call a function in a spawned process and return its result; a fork would inherit the parent's peak memory."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_answer, args=(theirs, work, arguments))
    child.start()
    theirs.close()
    try:
        row: Row = ours.recv()
    except EOFError:
        raise SystemExit(f"{work.__name__} failed") from None
    finally:
        child.join()
    return row


def _answer(answer: Connection, work: Callable[..., Row], arguments: tuple[object, ...]) -> None:
    answer.send(work(*arguments))


def command(*words: str | Path) -> Row:
    """Return time and peak memory of one `modis-dist data` command."""
    begin = time.monotonic()
    arguments = [sys.executable, "-c", COMMAND, *map(str, words)]
    done = subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - begin
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with {done.returncode}: {done.stderr}")
    return {"ours_ms": 1e3 * seconds, "peak_MiB": int(done.stderr.split()[-1]) // 1024}


def memory(*names: str) -> list[int]:
    """Return memory of this process in bytes: VmHWM is the peak, RssAnon the current memory without file pages."""
    lines = [line.partition(":") for line in Path("/proc/self/status").read_text().splitlines()]
    fields = {name: value.split() for name, _, value in lines}
    return [1024 * int(fields[name][0]) for name in names]


class OwnMemory:
    """Measures the peak memory without file pages during the block: ``peak``, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "OwnMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLING_S):
            self.peak = max(self.peak, *memory("RssAnon"))


# --- work -----------------------------------------------------------------------------------------------------


def make_source(folder: Path, rows: int, features: int, row_group_rows: int) -> Row:
    """Write tables of two modalities of the same samples, a wide and a narrow one, with 20 % zeros."""
    for modality, width in ((WIDE, features), (NARROW, NARROW_FEATURES)):
        _make_table(folder / f"{modality}.parquet", rows=rows, features=width, row_group_rows=row_group_rows)
    return {}


def _make_table(path: Path, *, rows: int, features: int, row_group_rows: int) -> None:
    rng = np.random.default_rng(0)
    columns = [pa.field(f"g{number}", pa.float32()) for number in range(features)]
    schema = pa.schema([pa.field("sample_id", pa.string()), pa.field("label", pa.string()), *columns])
    with pq.ParquetWriter(path, schema, use_dictionary=False, write_statistics=False) as writer:
        for start in range(0, rows, row_group_rows):
            numbers = range(start, min(rows, start + row_group_rows))
            values = rng.standard_normal((features, len(numbers)), dtype=np.float32)
            values[rng.random(values.shape, dtype=np.float32) < 0.2] = 0
            meta = [pa.array([f"s{i}" for i in numbers]), pa.array([f"c{i % CLASSES}" for i in numbers])]
            table = pa.Table.from_arrays([*meta, *(pa.array(row) for row in values)], schema=schema)
            writer.write_table(table, row_group_size=len(numbers))


class Clock:
    """Records the end of each step and requests a stop after a number of steps."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.times: list[float] = []

    def requested(self) -> str | None:
        """Return the reason to stop, or None."""
        self.times.append(time.perf_counter())
        return None if len(self.times) < self._steps else "the measurement is done"


def train(store: Path, storage: str, width: int, batch: int, steps: int) -> Row:
    """Return preparation time, batches and steps per second, and memory of a training on a store."""
    opened = Store.open(store)
    features = len(opened.features(WIDE))
    tree = {
        "model": {"latent": 16, "ratios": [width / features], "discriminator": [64]},
        "optim": {"batch_size": batch},
        "trainer": {"feature_storage": storage, "device": "cpu", "checkpoint_every": 1000},
    }
    run = parse.build(Run, tree, source="bench")
    with OwnMemory() as memory_use, tempfile.TemporaryDirectory() as name:
        begin = time.perf_counter()
        prepared = prepare(run, load_cohort(opened, run.data, storage=storage_of(run, opened)))
        seconds = time.perf_counter() - begin
        loader = Loader(
            [prepared],
            [0],
            batch_size=batch,
            epoch_length="shortest",
            min_labelled_fraction=0.25,
            latent=16,
            signs=False,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        times = [time.perf_counter()]
        for step in range(min(steps, loader.steps)):
            loader.batch(epoch=0, step=step)
            times.append(time.perf_counter())
        clock, member = Clock(steps), Member("t", run, prepared, Path(name))
        with suppress(Interrupted):
            fit([member], folder=Path(name), device=torch.device("cpu"), callbacks=Callbacks(stop=clock))
    return {
        "ours_ms": 1e3 * seconds,
        "batches_s": 1 / median(np.diff(times)),
        "steps_s": 1 / median(np.diff(clock.times)),
        "peak_MiB": memory("VmHWM")[0] // MIB,
        "own_MiB": memory_use.peak // MIB,
    }
