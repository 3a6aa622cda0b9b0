"""Features in files without a name, and rows read from the store a block at a time: the same as arrays in memory."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modis_dist.config.run import Preprocess
from modis_dist.data import preprocess
from modis_dist.data.store import arrays
from modis_dist.data.store import writer as writer_module
from modis_dist.data.store.arrays import RowView, materialise, refuse_insufficient_scratch
from modis_dist.data.store.index import Features
from modis_dist.data.store.reader import Store
from modis_dist.data.store.stored_rows import StoredRows
from modis_dist.data.store.writer import StoreWriter
from modis_dist.runtime.errors import DataError, RunFailed

ROWS, FEATURES = 61, 5
ADVICE = "; set TMPDIR to a folder on a disk with room, or trainer.features_in to memory"


def numbers(rows: int, features: int, seed: int = 0) -> Features:
    return np.random.default_rng(seed).lognormal(size=(rows, features)).astype(np.float32)


def parts_of(x: Features, size: int) -> Iterator[Features]:
    return (x[start : start + size].astype(np.float64) for start in range(0, len(x), size))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Eight rows a row group, two row groups a shard."""
    folder = tmp_path_factory.mktemp("data") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "ROW_GROUP_ROWS", 8)
        patch.setattr(writer_module, "SHARD_BYTES", 2 * 8 * FEATURES * 4)
        with StoreWriter(folder, source={"kind": "test"}) as writer:
            writer.begin("mirna", [f"g{i}" for i in range(FEATURES)])
            ids = [f"s{i}" for i in range(ROWS)]
            x = numbers(ROWS, FEATURES)
            writer.write("mirna", sample_id=ids, group_id=ids, label=[None] * ROWS, split=[""] * ROWS, x=x)
    return Store.open(folder)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# --- the same as in memory ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(0, 9), st.integers(1, 31), st.integers(0, 100))
def test_an_array_on_a_disk_is_the_array_in_memory(rows: int, features: int, size: int, seed: int) -> None:
    x = numbers(rows, features, seed)
    on_disk, in_memory = (materialise(x.shape, parts_of(x, size), place=place) for place in ("disk", "memory"))
    for held in (on_disk, in_memory):
        assert type(held) is np.ndarray and held.flags.c_contiguous and held.flags.writeable
        assert held.dtype == np.float32 and held.shape == x.shape and held.tobytes() == x.tobytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, ROWS - 1), max_size=40), st.integers(0, 40), st.integers(0, 40))
def test_rows_of_a_store_are_read_in_any_order_as_from_an_array(
    store: Store, rows: list[int], start: int, stop: int
) -> None:
    x, wanted = store.read("mirna"), np.array(rows, dtype=np.int64)
    held, columns = StoredRows(store, "mirna"), np.array([3, 0, 1])
    assert held.shape == x.shape and len(held) == ROWS
    assert held[wanted].tobytes() == x[wanted].tobytes()
    assert held[start:stop].tobytes() == x[start:stop].tobytes()
    for taken, whole in ((RowView(held, wanted), x[wanted]), (RowView(held, wanted, columns), x[wanted][:, columns])):
        assert taken.shape == whole.shape and len(taken) == len(whole)
        assert taken[start:stop].tobytes() == whole[start:stop].tobytes()
    twice = RowView(RowView(held, np.arange(0, ROWS, 2)), np.arange(4, 20, 3))
    assert twice[1:4].tobytes() == x[::2][4:20:3][1:4].tobytes()


def test_who_reads_in_ascending_order_reads_every_row_group_once_and_none_without_its_rows(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    genuine = Store.read
    monkeypatch.setattr(Store, "read", lambda self, name, rows: read.append(int(rows[0])) or genuine(self, name, rows))
    taken = RowView(StoredRows(store, "mirna"), np.array([1, 2, 6, 9, 15, 30, 31, 60]))
    for start in range(0, len(taken), 2):
        taken[start : start + 2]
    assert read == [0, 8, 24, 56]
    assert store.edges("mirna").tolist() == [0, 8, 16, 24, 32, 40, 48, 56, 61]


STEPS = [
    ["standardise"],
    ["impute", "log1p", "minmax"],
    [{"kind": "impute", "value": "median"}, {"kind": "variance", "features": 3}],
    ["standardise", {"kind": "pca", "components": 2}],
    [],
]


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_what_is_learnt_and_prepared_from_a_store_is_to_the_bit_what_it_is_from_memory(
    store: Store, steps: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "VALUES_PER_BLOCK", 50)
    chosen = Preprocess.model_validate({"default": steps}).default
    rows, others = np.arange(0, ROWS, 3), np.arange(1, ROWS, 3)
    x, stored = store.read("mirna"), StoredRows(store, "mirna")
    wanted = preprocess.fit(chosen, x[rows], features=store.features("mirna"), modality="mirna")
    found = preprocess.fit(chosen, RowView(stored, rows), features=store.features("mirna"), modality="mirna")
    for one, other in zip(found.steps, wanted.steps, strict=True):
        assert all(array.tobytes() == other.arrays[name].tobytes() for name, array in one.arrays.items())
    for part in (rows, others):
        assert found.apply(RowView(stored, part), place="disk").tobytes() == wanted.apply(x[part]).tobytes()


# --- nothing is left ----------------------------------------------------------------------------------------


def test_a_file_of_features_has_no_name_while_it_is_used(scratch: Path) -> None:
    x = numbers(50, 20)
    held = materialise(x.shape, parts_of(x, 7), place="disk")
    assert [*scratch.iterdir()] == [] and (held == x).all()
    (mapped,) = mapped_from(scratch)
    assert mapped.endswith(" (deleted)")
    del held
    assert mapped_from(scratch) == []


def mapped_from(folder: Path) -> list[str]:
    """Files of a folder that are part of the memory of this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if str(folder) in line]


def test_a_failure_while_it_is_written_leaves_nothing(scratch: Path) -> None:
    def failing() -> Iterator[Features]:
        yield numbers(3, 4)
        raise DataError("a value is missing")

    with pytest.raises(DataError, match="a value is missing"):
        materialise((6, 4), failing(), place="disk")
    assert [*scratch.iterdir()] == []


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    code = "import numpy as np; from modis_dist.data.store.arrays import materialise\n"
    code += "held = materialise((9, 9), [np.ones((9, 9))], place='disk')\n"
    code += "def more():\n  yield np.ones((3, 9)); print(held.sum(), flush=True); input()\n"
    code += "materialise((9, 9), more(), place='disk')\n"
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == "81.0\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL and [*tmp_path.iterdir()] == []


# --- a disk without room ------------------------------------------------------------------------------------


def test_a_disk_that_takes_no_more_is_one_line_with_what_to_do(scratch: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(RunFailed) as caught:
            materialise((1000, 20), parts_of(numbers(1000, 20), 100), place="disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(caught.value) == (
        f"{scratch}: 0.0 GB of features cannot be kept there (File too large){ADVICE}; the same command continues"
    )
    assert [*scratch.iterdir()] == []


def test_too_little_room_is_refused_before_anything_is_written(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=3_200_000_000))
    refuse_insufficient_scratch(3_200_000_000)
    with pytest.raises(DataError) as caught:
        refuse_insufficient_scratch(7_600_000_000)
    assert str(caught.value) == f"{scratch}: 7.6 GB of features are to be kept there, and 3.2 GB are free{ADVICE}"


def test_a_temporary_folder_that_is_memory_is_refused(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "file_system", lambda path: "tmpfs" if path == scratch else "ext4")
    with pytest.raises(DataError, match=f"and it lies in memory itself{ADVICE}"):
        refuse_insufficient_scratch(1)
    monkeypatch.setattr(arrays, "file_system", lambda _: "ext4")
    refuse_insufficient_scratch(1)
