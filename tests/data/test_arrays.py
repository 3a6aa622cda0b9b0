"""Feature arrays on disk and rows read from a store equal arrays in memory."""

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


def numbers(rows: int, features: int, seed: int = 0) -> Features:
    return np.random.default_rng(seed).lognormal(size=(rows, features)).astype(np.float32)


def parts_of(x: Features, size: int) -> Iterator[Features]:
    return (x[start : start + size].astype(np.float64) for start in range(0, len(x), size))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Write eight rows per row group and two row groups per shard."""
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
    """Use a temporary folder of this test as TMPDIR."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# --- equality with memory -----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 30), st.integers(0, 9), st.integers(1, 31), st.integers(0, 100))
def test_arrays_on_disk_and_in_memory_are_equal(rows: int, features: int, size: int, seed: int) -> None:
    x = numbers(rows, features, seed)
    on_disk, in_memory = (materialise(x.shape, parts_of(x, size), storage=storage) for storage in ("disk", "memory"))
    for array in (on_disk, in_memory):
        assert type(array) is np.ndarray and array.flags.c_contiguous and array.flags.writeable
        assert array.dtype == np.float32 and array.shape == x.shape and array.tobytes() == x.tobytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, ROWS - 1), max_size=40), st.integers(0, 40), st.integers(0, 40))
def test_stored_rows_can_be_read_in_any_order(store: Store, rows: list[int], start: int, stop: int) -> None:
    x, selected = store.read("mirna"), np.array(rows, dtype=np.int64)
    stored, columns = StoredRows(store, "mirna"), np.array([3, 0, 1])
    assert stored.shape == x.shape and len(stored) == ROWS
    assert stored[selected].tobytes() == x[selected].tobytes()
    assert stored[start:stop].tobytes() == x[start:stop].tobytes()
    for taken, whole in (
        (RowView(stored, selected), x[selected]),
        (RowView(stored, selected, columns), x[selected][:, columns]),
    ):
        assert taken.shape == whole.shape and len(taken) == len(whole)
        assert taken[start:stop].tobytes() == whole[start:stop].tobytes()
    twice = RowView(RowView(stored, np.arange(0, ROWS, 2)), np.arange(4, 20, 3))
    assert twice[1:4].tobytes() == x[::2][4:20:3][1:4].tobytes()


def test_ascending_reads_load_every_needed_row_group_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
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
    [{"kind": "impute", "strategy": "median"}, {"kind": "variance_filter", "features": 3}],
    ["standardise", {"kind": "pca", "components": 2}],
    [],
]


@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_preprocessing_from_a_store_and_from_memory_is_bit_identical(
    store: Store, steps: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "VALUES_PER_BLOCK", 50)
    chosen = Preprocess.model_validate({"default": steps}).default
    rows, others = np.arange(0, ROWS, 3), np.arange(1, ROWS, 3)
    x, stored = store.read("mirna"), StoredRows(store, "mirna")
    expected = preprocess.fit(chosen, x[rows], features=store.features("mirna"), modality="mirna")
    fitted = preprocess.fit(chosen, RowView(stored, rows), features=store.features("mirna"), modality="mirna")
    for step, expected_step in zip(fitted.steps, expected.steps, strict=True):
        assert all(array.tobytes() == expected_step.arrays[name].tobytes() for name, array in step.arrays.items())
    for part in (rows, others):
        assert fitted.apply(RowView(stored, part), storage="disk").tobytes() == expected.apply(x[part]).tobytes()


# --- clean-up -----------------------------------------------------------------------------------------------


def test_a_feature_file_is_unnamed_while_in_use(scratch: Path) -> None:
    x = numbers(50, 20)
    array = materialise(x.shape, parts_of(x, 7), storage="disk")
    assert [*scratch.iterdir()] == [] and (array == x).all()
    (mapped,) = mapped_from(scratch)
    assert mapped.endswith(" (deleted)")
    del array
    assert mapped_from(scratch) == []


def mapped_from(folder: Path) -> list[str]:
    """Return the files of a folder that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.split(maxsplit=5)[5] for line in lines if str(folder) in line]


def test_a_failed_write_leaves_no_file(scratch: Path) -> None:
    def failing() -> Iterator[Features]:
        yield numbers(3, 4)
        raise DataError("sample 3")

    with pytest.raises(DataError, match=r"^sample 3$"):
        materialise((6, 4), failing(), storage="disk")
    assert [*scratch.iterdir()] == []


def test_a_killed_process_leaves_no_file(tmp_path: Path) -> None:
    code = "import numpy as np; from modis_dist.data.store.arrays import materialise\n"
    code += "held = materialise((9, 9), [np.ones((9, 9))], storage='disk')\n"
    code += "def more():\n  yield np.ones((3, 9)); print(held.sum(), flush=True); input()\n"
    code += "materialise((9, 9), more(), storage='disk')\n"
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


# --- insufficient disk space --------------------------------------------------------------------------------


def test_a_full_disk_is_reported_with_advice(scratch: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(RunFailed) as caught:
            materialise((1000, 20), parts_of(numbers(1000, 20), 100), storage="disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    assert message.startswith(f"{scratch}: ") and "(File too large)" in message
    assert "TMPDIR" in message and "trainer.feature_storage" in message
    assert [*scratch.iterdir()] == []


def test_insufficient_disk_space_is_refused_before_writing(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda _: SimpleNamespace(free=3_200_000_000))
    refuse_insufficient_scratch(3_200_000_000)
    with pytest.raises(DataError) as caught:
        refuse_insufficient_scratch(7_600_000_000)
    message = str(caught.value)
    assert message.startswith(f"{scratch}: ") and "7.6 GB" in message and "3.2 GB" in message
    assert "TMPDIR" in message and "trainer.feature_storage" in message


def test_a_temporary_folder_in_memory_is_refused(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "file_system", {scratch: "tmpfs"}.__getitem__)
    with pytest.raises(DataError, match=rf"^{scratch}: .*\(tmpfs\).*TMPDIR.*trainer\.feature_storage"):
        refuse_insufficient_scratch(1)
    monkeypatch.setattr(arrays, "file_system", {scratch: "ext4"}.__getitem__)
    refuse_insufficient_scratch(1)
