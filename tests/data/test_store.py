"""The store: values are read bit-identical, and damaged stores are refused."""

import errno
import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from modis_dist.data.store import reader as store_module
from modis_dist.data.store import writer as writer_module
from modis_dist.data.store.coverage import verify
from modis_dist.data.store.index import UNLABELLED
from modis_dist.data.store.reader import Store
from modis_dist.data.store.rules import natural_order
from modis_dist.data.store.writer import StoreWriter, row_group_rows
from modis_dist.runtime.errors import DataError

ROWS, FEATURES = 60, 5


@pytest.fixture(autouse=True)
def small_row_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write eight rows per row group and two row groups per shard: 60 rows in four shards."""
    monkeypatch.setattr(writer_module, "ROW_GROUP_ROWS", 8)
    monkeypatch.setattr(writer_module, "SHARD_BYTES", 2 * 8 * FEATURES * 4)


def matrix(seed: int, rows: int = ROWS) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).normal(size=(rows, FEATURES)).astype(np.float32)
    x[0, 0], x[1, 1], x[2, 2] = np.nan, -0.0, 1e-45
    return x


def write_store(out: Path) -> dict[str, NDArray[np.float32]]:
    matrices = {name: matrix(seed) for seed, name in enumerate(("mirna", "cnv"))}
    with StoreWriter(out, source={"kind": "test"}) as writer:
        for name, x in matrices.items():
            writer.begin(name, [f"g{i}" for i in range(FEATURES)])
            for start in range(0, ROWS, 7):
                rows = range(start, min(ROWS, start + 7))
                writer.write(
                    name,
                    sample_id=[f"s{i}" for i in rows],
                    group_id=[f"p{i // 2}" for i in rows],
                    label=[None if i % 4 == 0 else str(i % 4 * 5) for i in rows],
                    split=["" if i % 3 == 0 else "train" if i // 2 % 2 else "test" for i in rows],
                    x=x[start : start + 7],
                )
    return matrices


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path / "store"


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != store_module.VERIFIED
    }


# --- round trips --------------------------------------------------------------------------------------------


def test_values_are_read_bit_identical_and_in_order(tmp_path: Path) -> None:
    matrices = write_store(tmp_path / "store")
    opened = Store.open(tmp_path / "store")
    assert opened.modalities == ("mirna", "cnv")
    assert opened.features("cnv") == ("g0", "g1", "g2", "g3", "g4")
    for name, x in matrices.items():
        values = opened.read(name)
        assert values.dtype == np.float32 and values.flags.c_contiguous
        assert values.tobytes() == x.tobytes()


def test_classes_are_in_natural_order_and_null_labels_are_unlabelled(folder: Path) -> None:
    opened = Store.open(folder)
    assert opened.classes == ("5", "10", "15")
    index = opened.index("mirna")
    expected = [UNLABELLED if i % 4 == 0 else i % 4 - 1 for i in range(ROWS)]
    assert index.label.tolist() == expected
    assert index.label.dtype == np.int64
    assert index.sample_id.tolist() == [f"s{i}" for i in range(ROWS)]
    assert index.group_id.tolist() == [f"p{i // 2}" for i in range(ROWS)]
    assert set(index.split) == {"", "train", "test"}


def test_natural_order_puts_2_before_10_and_keeps_letters_together() -> None:
    assert sorted(["10", "2", "a10", "a9", "B", "01", "1", ""], key=natural_order) == [
        "",
        "01",
        "1",
        "2",
        "10",
        "B",
        "a9",
        "a10",
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, NDArray[np.float32]]:
    """Return a store for the tests of this module and the rows of its first modality."""
    folder = tmp_path_factory.mktemp("module") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "ROW_GROUP_ROWS", 8)
        matrices = write_store(folder)
    return Store.open(folder), matrices["mirna"]


@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=40))
@settings(max_examples=40, deadline=None)
def test_any_rows_in_any_order_equal_numpy_indexing(
    written: tuple[Store, NDArray[np.float32]], rows: list[int]
) -> None:
    store, x = written
    assert store.read("mirna", np.array(rows, dtype=np.int64)).tobytes() == x[rows].tobytes()


def test_only_the_row_groups_that_hold_the_rows_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Store.open(folder)
    touched: list[tuple[str, int]] = []
    real = pq.ParquetFile

    class Spy(real):
        def __init__(self, path: Path, **options: bool) -> None:
            self.path = path
            super().__init__(path, **options)

        def read_row_group(self, number: int, **options: list[str]) -> object:
            touched.append((self.path.name, number))
            return super().read_row_group(number, **options)

    monkeypatch.setattr(pq, "ParquetFile", Spy)
    opened.read("mirna", np.array([20, 3, 19]))
    assert touched == [("part-00000.parquet", 0), ("part-00001.parquet", 0)]


def test_row_groups_stream_the_same_rows_as_a_whole_read(folder: Path) -> None:
    opened = Store.open(folder)
    pieces = list(opened.batches("cnv"))
    assert [len(index) for index, _ in pieces] == [8, 8, 8, 8, 8, 8, 8, 4]
    assert np.concatenate([x for _, x in pieces]).tobytes() == opened.read("cnv").tobytes()
    assert np.concatenate([index.label for index, _ in pieces]).tolist() == opened.index("cnv").label.tolist()


def test_no_rows_give_an_empty_matrix_and_rows_outside_are_refused(folder: Path) -> None:
    opened = Store.open(folder)
    assert opened.read("cnv", np.array([], dtype=np.int64)).shape == (0, FEATURES)
    for row in (-1, ROWS):
        with pytest.raises(IndexError):
            opened.read("cnv", np.array([row]))


def test_an_unknown_modality_is_refused_with_the_nearest(folder: Path) -> None:
    with pytest.raises(DataError, match=r"'mirn'; .*'mirna'"):
        Store.open(folder).rows("mirn")


@pytest.mark.parametrize(("features", "rows"), [(1, 1024), (537, 1024), (20_000, 419), (32_768, 256), (10_000_000, 1)])
def test_a_row_group_is_bounded_in_rows_and_bytes(features: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "ROW_GROUP_ROWS", 1024)
    assert row_group_rows(features) == rows


def test_shards_have_the_columns_and_encodings_of_the_format(folder: Path) -> None:
    shards = sorted((folder / "mirna").iterdir())
    assert [shard.name for shard in shards] == [f"part-{i:05d}.parquet" for i in range(4)]
    schema = pq.read_schema(shards[0])
    assert schema.names == ["sample_id", "group_id", "label", "split", "features"]
    assert str(schema.field("features").type).startswith(
        "extension<arrow.fixed_shape_tensor[value_type=float, shape=[5]"
    )
    vectors = pq.ParquetFile(shards[0]).metadata.row_group(0).column(4)
    assert vectors.compression == "ZSTD" and "BYTE_STREAM_SPLIT" in vectors.encodings
    assert b"g4" not in shards[0].read_bytes()  # feature names are the manifest's


def test_the_fingerprint_depends_on_the_values(tmp_path: Path) -> None:
    write_store(tmp_path / "a")
    write_store(tmp_path / "b")
    with StoreWriter(tmp_path / "c", source={}) as writer:
        writer.begin("mirna", ["g"])
        writer.write("mirna", sample_id=["s"], group_id=["s"], label=["x"], split=[""], x=np.ones((1, 1), np.float32))
    prints = [Store.open(tmp_path / name).fingerprint for name in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_all_files_are_private_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_store(tmp_path / "store")
        Store.open(tmp_path / "store")
    finally:
        os.umask(before)
    for path in [tmp_path / "store", *(tmp_path / "store").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


# --- atomic writes --------------------------------------------------------------------------------------------


def test_an_existing_target_is_refused_and_unchanged(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(DataError, match=f"{folder}: "):
        write_store(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("mistake", [RuntimeError("ours"), KeyboardInterrupt()])
def test_a_failed_write_leaves_no_files(tmp_path: Path, mistake: BaseException) -> None:
    with pytest.raises(type(mistake)), StoreWriter(tmp_path / "store", source={}) as writer:
        writer.begin("mirna", ["a", "b"])
        for number in range(20):
            x = np.zeros((1, 2), np.float32)
            writer.write("mirna", sample_id=[f"s{number}"], group_id=["p"], label=[None], split=[""], x=x)
        raise mistake
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_one_line_error_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> object:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(writer_module, "_create", full)
    with pytest.raises(DataError, match=rf"store: .*{os.strerror(errno.ENOSPC)}"):
        write_store(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_folders_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        StoreWriter(tmp_path / "store", source={}).__enter__()
        os._exit(0)
    os.waitpid(child, 0)
    (dead,) = tmp_path.iterdir()
    living = tmp_path / dead.name.replace(f".{child}.", f".{os.getpid()}.")
    living.mkdir()
    assert len(list(tmp_path.iterdir())) == 2
    write_store(tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "store"])


def test_a_store_without_a_modality_or_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path / 'a'}: "), StoreWriter(tmp_path / "a", source={}):
        pass
    with pytest.raises(DataError, match="mirna: "), StoreWriter(tmp_path / "b", source={}) as writer:
        writer.begin("mirna", ["a"])
    assert list(tmp_path.iterdir()) == []


# --- damage ---------------------------------------------------------------------------------------------------


def test_missing_and_truncated_shards_are_all_named(folder: Path) -> None:
    (folder / "mirna" / "part-00002.parquet").unlink()
    short = folder / "cnv" / "part-00001.parquet"
    size = short.stat().st_size
    short.write_bytes(short.read_bytes()[:100])
    with pytest.raises(DataError, match="2 of 8 ") as caught:
        Store.open(folder)
    assert "mirna/part-00002.parquet (missing)" in str(caught.value)
    assert f"cnv/part-00001.parquet (100 of {size} bytes)" in str(caught.value)


def test_of_many_missing_shards_five_are_named_and_the_others_counted(folder: Path) -> None:
    for shard in folder.rglob("part-*.parquet"):
        shard.unlink()
    with pytest.raises(DataError, match=r"8 of 8 [^/]*(/part[^/]*){5}, \.\.\.; "):
        Store.open(folder)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_shard_is_refused(folder: Path, share: float) -> None:
    shard = folder / "mirna" / "part-00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=rf"mirna/part-00000\.parquet .*\b{len(whole)} bytes"):
        Store.open(folder)


def _to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _to_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_to_folder, "not a regular file"),
        (_to_pipe, "not a regular file"),
        (_to_loop, "Too many levels of symbolic links"),
    ],
)
def test_a_shard_that_is_not_a_file_is_refused_without_blocking(
    folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder / "mirna" / "part-00000.parquet")
    with pytest.raises(DataError, match=message):
        Store.open(folder)


def test_a_shard_with_other_content_is_refused_with_both_hashes(folder: Path) -> None:
    shard = folder / "mirna" / "part-00000.parquet"
    before = hashlib.sha256(shard.read_bytes()).hexdigest()
    shard.write_bytes(_flipped(shard.read_bytes(), random.Random(3)))
    after = hashlib.sha256(shard.read_bytes()).hexdigest()
    with pytest.raises(DataError, match=rf"SHA-256 {after[:12]}\.\.\., expected {before[:12]}"):
        Store.open(folder)


def _flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_opening_a_store_detects_300_single_bit_flips_in_shards(folder: Path) -> None:
    rng = random.Random(0)
    shards = sorted(folder.rglob("part-*.parquet"))
    Store.open(folder)
    for number in range(300):
        shard = shards[number % len(shards)]
        whole = shard.read_bytes()
        shard.write_bytes(_flipped(whole, rng))
        with pytest.raises(DataError):
            Store.open(folder)
        shard.write_bytes(whole)
    assert Store.open(folder).rows("mirna") == ROWS


def test_300_bit_flips_behind_the_hash_cache_are_never_read_as_other_values(folder: Path) -> None:
    rng = random.Random(1)
    opened = Store.open(folder)
    truth = {name: (opened.read(name).tobytes(), opened.index(name)) for name in opened.modalities}
    shards = sorted(folder.rglob("part-*.parquet"))
    silent, errors = 0, 0
    for number in range(300):
        shard = shards[number % len(shards)]
        whole, status = shard.read_bytes(), shard.stat()
        shard.write_bytes(_flipped(whole, rng))
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
        name = shard.parent.name
        try:
            again = Store.open(folder)
            index = again.index(name)
            same = again.read(name).tobytes() == truth[name][0] and all(
                np.array_equal(getattr(index, field), getattr(truth[name][1], field))
                for field in ("sample_id", "group_id", "label", "split")
            )
            silent += not same
        except DataError:
            errors += 1
        shard.write_bytes(whole)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert silent == 0
    assert errors > 200


def test_300_bit_flips_in_the_manifest_never_open_other_data(folder: Path) -> None:
    rng = random.Random(2)
    whole = Store.open(folder)
    manifest = folder / "manifest.json"
    text = manifest.read_bytes()
    for _ in range(300):
        manifest.write_bytes(_flipped(text, rng))
        try:
            opened = Store.open(folder)
        except DataError:
            continue
        assert (opened.fingerprint, opened.classes, opened.tables) == (whole.fingerprint, whole.classes, whole.tables)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "manifest.json: damaged"),
        ("[]", "manifest.json: damaged"),
        ('{"format": "other"}', "manifest.json: damaged"),
        ("[" * 100_000, "manifest.json: damaged"),
        ('{"format": "modis-dist store", "version": 99}', r"manifest.json: .*\b99\b"),
        ('{"format": "modis-dist store", "version": 1}', "manifest.json: damaged"),
    ],
)
def test_an_invalid_manifest_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        Store.open(folder)


@pytest.mark.parametrize("name", ["../../outside.parquet", "/etc/passwd", "part-0.parquet"])
def test_a_manifest_cannot_name_a_file_elsewhere(folder: Path, name: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["modalities"][0]["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        Store.open(folder)


@pytest.mark.parametrize("path", ["absent", "file"])
def test_a_path_that_is_not_a_store_is_refused_with_advice(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=rf"{tmp_path / path}: .*modis-dist data import"):
        Store.open(tmp_path / path)


def test_a_shard_that_changes_after_opening_is_refused_at_the_next_read(folder: Path) -> None:
    opened = Store.open(folder)
    shard = folder / "mirna" / "part-00000.parquet"
    os.utime(shard, ns=(0, 0))
    with pytest.raises(DataError, match=f"{shard}: "):
        opened.read("mirna")


# --- the cache of verified shards -----------------------------------------------------------------------------


def test_an_unchanged_shard_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    sha256 = store_module.sha256

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(store_module, "sha256", counted)
    Store.open(folder)
    assert len(hashed) == 8
    Store.open(folder)
    assert len(hashed) == 8
    os.utime(folder / "cnv" / "part-00003.parquet", ns=(1, 1))
    Store.open(folder)
    assert len(hashed) == 9
    verify(folder, progress=lambda *_: None)
    assert len(hashed) == 17


@pytest.mark.parametrize("text", ["{", "[]", '{"mirna/part-00000.parquet": 3}'])
def test_a_damaged_cache_is_ignored(folder: Path, text: str) -> None:
    (folder / ".verified.json").write_text(text)
    assert Store.open(folder).rows("mirna") == ROWS


def test_a_read_only_store_is_opened_without_a_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store_module, "write_json", refused)
    assert Store.open(folder).rows("mirna") == ROWS
    assert not (folder / ".verified.json").exists()
