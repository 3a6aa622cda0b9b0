"""Import: the store equals the files, and invalid files are refused by name."""

import gzip
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modis_dist.data.importers import import_source as source_module
from modis_dist.data.importers import tables, transpose
from modis_dist.data.importers.convert import import_source
from modis_dist.data.store.reader import Store
from modis_dist.data.store.rules import class_name, converted_names
from modis_dist.runtime.errors import DataError

FEATURES = ["TP53", "BRCA1", "MYC", "EGFR"]
Mutation = Callable[[pd.DataFrame], pd.DataFrame]


def frame(seed: int = 0, rows: int = 12) -> pd.DataFrame:
    x = np.random.default_rng(seed).normal(size=(rows, len(FEATURES))).astype(np.float32)
    meta = pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(rows)],
            "label": [["LUAD", "KIRC", None][i % 3] for i in range(rows)],
            "group_id": [f"p{i // 2}" for i in range(rows)],
            "split": ["train" if i // 2 % 3 else "test" for i in range(rows)],
        }
    )
    return pd.concat([meta, pd.DataFrame(x, columns=FEATURES)], axis=1)


def write(folder: Path, name: str, cells: pd.DataFrame) -> None:
    folder.mkdir(exist_ok=True)
    if name.endswith(".parquet"):
        cells.to_parquet(folder / name, index=False)
    else:
        separator = "\t" if ".tsv" in name else ","
        cells.to_csv(folder / name, index=False, sep=separator)


def imported(source: Path) -> Store:
    out = source.parent / "store"
    import_source(source, out, progress=lambda *_: None)
    return Store.open(out)


def refusal(source: Path) -> str:
    """Return the one-line error of an import that must leave no files and change none."""
    before = sorted(path.name for path in source.parent.iterdir())
    with pytest.raises(DataError) as caught:
        imported(source)
    assert sorted(path.name for path in source.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def import_changed(tmp_path: Path, change: Mutation, name: str = "mirna.parquet") -> Path:
    """Write a source of two modalities, one of them changed."""
    source = tmp_path / "source"
    write(source, "cnv.parquet", frame(1))
    write(source, name, change(frame()))
    return source


# --- valid input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["parquet", "csv", "tsv", "csv.gz", "tsv.gz"])
def test_every_table_format_gives_the_same_store(tmp_path: Path, suffix: str) -> None:
    cells = frame()
    cells.loc[3, "MYC"] = np.nan
    write(tmp_path / "source", f"mirna.{suffix}", cells)
    write(tmp_path / "source", "cnv.parquet", frame(1))
    store = imported(tmp_path / "source")
    assert store.modalities == ("cnv", "mirna")
    assert store.features("mirna") == tuple(FEATURES)
    np.testing.assert_allclose(store.read("mirna"), cells[FEATURES].to_numpy(np.float32), rtol=1e-6)
    index = store.index("mirna")
    for column, column_values in (("sample_id", index.sample_id), ("group_id", index.group_id), ("split", index.split)):
        assert column_values.tolist() == cells[column].tolist()
    assert store.classes == ("KIRC", "LUAD")
    assert index.label.tolist() == [[1, 0, -1][i % 3] for i in range(12)]


def test_parquet_floats_are_imported_bit_identical(tmp_path: Path) -> None:
    source = import_changed(tmp_path, lambda cells: cells)
    assert imported(source).read("mirna").tobytes() == frame()[FEATURES].to_numpy(np.float32).tobytes()


@pytest.mark.parametrize("kind", ["float64", "float16", "int8", "int64", "uint16", "nullable", "null"])
def test_numeric_columns_of_every_kind_become_float32(tmp_path: Path, kind: str) -> None:
    values = {"nullable": pa.array([1, None] * 6, pa.int32()), "null": pa.nulls(12)}
    column = values[kind] if kind in values else pa.array(np.arange(12, dtype=kind))
    table = pa.Table.from_pandas(frame()).append_column("extra", column)
    (tmp_path / "source").mkdir()
    pq.write_table(table, tmp_path / "source" / "mirna.parquet")
    expected = {"nullable": [1, np.nan] * 6, "null": [np.nan] * 12}.get(kind, list(range(12)))
    np.testing.assert_array_equal(imported(tmp_path / "source").read("mirna")[:, -1], expected)


def test_null_and_nan_both_count_as_missing(tmp_path: Path) -> None:
    table = pa.Table.from_pandas(frame()).append_column("extra", pa.array([None, float("nan"), 1.0] * 4))
    (tmp_path / "source").mkdir()
    pq.write_table(table, tmp_path / "source" / "mirna.parquet")
    store = imported(tmp_path / "source")
    assert np.isnan(store.read("mirna")[:, -1]).tolist() == [True, True, False] * 4
    assert any(line.startswith("mirna.parquet: 8 ") and "13.33%" in line for line in store.notices)


def test_without_group_and_split_a_sample_is_its_own_group(tmp_path: Path) -> None:
    source = import_changed(tmp_path, lambda cells: cells.drop(columns=["group_id", "split"]))
    write(source, "cnv.parquet", frame(1).drop(columns=["group_id", "split"]))
    index = imported(source).index("mirna")
    assert index.group_id.tolist() == index.sample_id.tolist()
    assert set(index.split) == {""}


def test_integer_labels_are_the_same_class_in_every_format(tmp_path: Path) -> None:
    label = [i % 3 + 1 for i in range(12)]
    for number, (name, values) in enumerate(
        {"a.parquet": label, "b.parquet": [float(v) for v in label], "c.csv": [float(v) for v in label]}.items()
    ):
        write(tmp_path / "source", name, frame(number).assign(label=values))
    store = imported(tmp_path / "source")
    assert store.classes == ("1", "2", "3")
    assert all(store.index(name).label.tolist() == [v - 1 for v in label] for name in store.modalities)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, None), ("", None), (float("nan"), None), (1, "1"), (1.0, "1"), ("1.0", "1"), ("a-1", "a-1"),
        ("LUAD", "LUAD"), ("007", "007"), ("1e3", "1e3"), (True, "true"),
        ("Luad ", "Luad "), ("v1.5", "v1.5"),
    ],
)  # fmt: skip
def test_a_label_means_one_class(value: object, name: str | None) -> None:
    assert class_name(value) == name


def test_reserved_feature_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mirna\.parquet: .*'modality'"):
        imported(import_changed(tmp_path, lambda cells: cells.assign(modality=1.0)))


@pytest.mark.parametrize("value", [-1, -1.0, "-1", "-1.0", -100, "-100"])
def test_negative_numbers_are_not_classes(value: object) -> None:
    with pytest.raises(ValueError, match=rf"label {int(float(value))}\b"):
        class_name(value)


@pytest.mark.parametrize("value", [1.5, "1.5", ".5", float("inf")])
def test_non_integer_numbers_are_not_classes(value: object) -> None:
    with pytest.raises(ValueError, match=f"label '{value}'"):
        class_name(value)


def test_integer_sample_ids_become_text(tmp_path: Path) -> None:
    source = import_changed(tmp_path, lambda cells: cells.assign(sample_id=range(100, 112)))
    assert imported(source).index("mirna").sample_id.tolist() == [str(i) for i in range(100, 112)]


def test_feature_names_may_be_any_unicode_and_contain_dots_slashes_and_markup(tmp_path: Path) -> None:
    names = {"TP53": "g", "BRCA1": "g.1", "MYC": "../β-actin\n", "EGFR": "<img src=x>"}
    source = import_changed(tmp_path, lambda cells: cells.rename(columns=names))
    store = imported(source)
    assert store.features("mirna") == tuple(names.values())
    assert store.read("mirna").tobytes() == frame()[FEATURES].to_numpy(np.float32).tobytes()


def test_metadata_columns_may_be_at_any_position(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.csv"):
        write(tmp_path / "source", name, frame()[[*FEATURES, "label", "sample_id"]])
    store = imported(tmp_path / "source")
    assert store.features("a") == store.features("b") == tuple(FEATURES)
    np.testing.assert_allclose(store.read("a"), store.read("b"), rtol=1e-6)


def test_a_row_group_too_large_for_memory_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = frame(rows=50)
    source = import_changed(tmp_path, lambda _: cells)
    monkeypatch.setattr(tables, "WHOLE_GROUP_BYTES", 100)
    monkeypatch.setattr(transpose, "COLUMN_BLOCK_BYTES", 3 * 4 * 50)
    monkeypatch.setattr(source_module, "PIECE_BYTES", 7 * 4 * len(FEATURES))
    assert imported(source).read("mirna").tobytes() == cells[FEATURES].to_numpy(np.float32).tobytes()


def test_several_row_groups_and_text_blocks_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = frame(rows=200)
    monkeypatch.setattr(tables, "TEXT_BLOCK_BYTES", 2000)
    monkeypatch.setattr(source_module, "PIECE_BYTES", 7 * 4 * len(FEATURES))
    write(tmp_path / "source", "text.csv.gz", cells)
    pq.write_table(pa.Table.from_pandas(cells), tmp_path / "source" / "wide.parquet", row_group_size=33)
    store = imported(tmp_path / "source")
    for name in ("text", "wide"):
        assert store.index(name).sample_id.tolist() == cells["sample_id"].tolist()
        np.testing.assert_allclose(store.read(name), cells[FEATURES], rtol=1e-6)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: dict[str, tuple[int, int]] = {}
    source = import_changed(tmp_path, lambda cells: cells, "mirna.csv")
    import_source(source, tmp_path / "store", progress=lambda name, done, total: seen.update({name: (done, total)}))
    assert seen["cnv"] == (12, 12)
    assert seen["mirna"][0] == seen["mirna"][1] > 0


# --- notices --------------------------------------------------------------------------------------------------


def test_one_modality_is_imported_with_a_notice(tmp_path: Path) -> None:
    write(tmp_path / "source", "mirna.parquet", frame())
    assert any("one modality" in line for line in imported(tmp_path / "source").notices)


def test_names_converted_by_a_spreadsheet_are_noticed(tmp_path: Path) -> None:
    names = {"TP53": "1-Mar", "MYC": "2.31E+13"}
    store = imported(import_changed(tmp_path, lambda cells: cells.rename(columns=names)))
    assert any(line.startswith("mirna.parquet: 2 ") and "1-Mar, 2.31E+13" in line for line in store.notices)


def test_numbered_features_are_not_taken_for_dates() -> None:
    assert converted_names(["1-Mar", "2-Sep", "44256", "TP53", "2.31E+13", "MYC", "H2-K1", "A"]) == [
        "1-Mar",
        "2-Sep",
        "44256",
        "2.31E+13",
    ]
    assert converted_names([str(number) for number in range(44_000, 45_000)]) == []


def test_unshared_samples_similar_classes_and_ignored_files_are_noticed(tmp_path: Path) -> None:
    source = import_changed(
        tmp_path,
        lambda cells: cells.assign(
            sample_id=[f"other{i}" for i in range(12)],
            group_id=[f"q{i}" for i in range(12)],
            label=["luad", "LUAD"] * 6,
        ),
    )
    (source / "README.md").write_text("x")
    (source / ".hidden").write_text("x")
    ignored, classes, pairing = imported(source).notices
    assert "README.md" in ignored and ".hidden" not in ignored
    assert "'LUAD'" in classes and "'luad'" in classes and "two modalities" in pairing


# --- invalid input is refused by name -------------------------------------------------------------------------


def _set(row: int, column: str, value: object) -> Mutation:
    def change(cells: pd.DataFrame) -> pd.DataFrame:
        cells[column] = cells[column].astype(object if isinstance(value, str) or value is None else np.float64)
        cells.loc[row, column] = value
        return cells

    return change


def _renamed(**names: str) -> Mutation:
    return lambda cells: cells.rename(columns=names)


WRONG: dict[str, tuple[Mutation, str]] = {
    "no sample_id": (
        _renamed(sample_id="Sample_id"),
        r"mirna.parquet: .*sample_id; did you mean 'Sample_id'\?",
    ),
    "no label": (_renamed(label="labels"), r"mirna.parquet: .*label; did you mean 'labels'\?"),
    "missing id": (_set(4, "sample_id", None), "mirna.parquet, data row 5: sample_id is missing"),
    "empty id": (_set(4, "sample_id", ""), "mirna.parquet, data row 5: sample_id is missing"),
    "float id": (
        lambda cells: cells.assign(sample_id=np.arange(12) / 2),
        r"data row 1: sample_id .*float \(0.0\)",
    ),
    "duplicate id": (_set(4, "sample_id", "s1"), "data row 5: .*'s1'.*data row 2"),
    "id in other case": (
        _set(4, "sample_id", "S4"),
        "mirna.parquet, data row 5: sample_id 'S4' and 's4' in cnv.parquet, data row 5",
    ),
    "id with a space": (
        _set(4, "sample_id", "s4 "),
        "sample_id 's4 ' and 's4' in cnv.parquet, data row 5",
    ),
    "id twice by case": (_set(4, "sample_id", "S1"), "sample_id 'S1' and 's1' in cnv.parquet, data row 2"),
    "text feature": (
        lambda cells: cells.assign(MYC="high"),
        "column 'MYC' .*type (large_)?string",
    ),
    "bool feature": (lambda cells: cells.assign(MYC=True), "column 'MYC' .*type bool"),
    "category feature": (
        lambda cells: cells.assign(MYC=pd.Categorical(["a"] * 12)),
        "column 'MYC' .*type dictionary",
    ),
    "date feature": (lambda cells: cells.assign(MYC=pd.Timestamp("2020-01-01")), "column 'MYC' has type timestamp"),
    "list feature": (lambda cells: cells.assign(MYC=[[1.0]] * 12), "column 'MYC' has type list"),
    "large integer": (
        lambda cells: cells.assign(MYC=[2**24 + (i == 7) for i in range(12)]),
        "data row 8, column 'MYC': integer 16777217 .*16777216",
    ),
    "negative large integer": (
        lambda cells: cells.assign(MYC=-(2**40)),
        "data row 1, column 'MYC': integer -1099511627776",
    ),
    "infinity": (
        _set(5, "BRCA1", np.inf),
        "mirna.parquet, data row 6, sample 's5', feature 'BRCA1': .*3.4e38",
    ),
    "minus infinity": (_set(5, "BRCA1", -np.inf), "data row 6, sample 's5', feature 'BRCA1': infinite"),
    "too large": (
        _set(0, "EGFR", 1e300),
        "data row 1, sample 's0', feature 'EGFR': .*3.4e38",
    ),
    "no feature": (lambda cells: cells.drop(columns=FEATURES), "mirna.parquet: no feature columns"),
    "no row": (
        lambda cells: cells.iloc[:0].astype(dict.fromkeys(FEATURES, np.float32)),
        "mirna.parquet: no rows",
    ),
    "empty feature name": (_renamed(MYC=" "), "mirna.parquet: column 3 has no name"),
    "same name after case": (_renamed(MYC="tp53"), r"columns 1 and 3 .*\('TP53', 'tp53'\)"),
    "same name after strip": (_renamed(MYC="TP53 "), r"columns 1 and 3 .*\('TP53', 'TP53 '\)"),
    "same name after NFC": (
        _renamed(TP53="caf\u00e9", MYC="cafe\u0301"),
        r"columns 1 and 3 .*\('caf\\\\xe9', 'cafe\\\\u0301'\)",
    ),
    "saved index": (_renamed(MYC="Unnamed: 0"), "column 'Unnamed: 0' .*index"),
    "fraction label": (
        lambda cells: cells.assign(label=[1.0, 1.5] * 6),
        "data row 2: label '1.5'",
    ),
    "date label": (
        lambda cells: cells.assign(label=pd.Timestamp("2020-01-01")),
        "column label .*type timestamp",
    ),
    "other label": (
        _set(0, "label", "KIRC"),
        "mirna.parquet, data row 1: label of sample 's0' .*'KIRC'.*'LUAD' in cnv.parquet, data row 1",
    ),
    "other group": (
        _set(0, "group_id", "p9"),
        "data row 1: group_id of sample 's0' .*'p9'.*'p0' in cnv.parquet, data row 1",
    ),
    "no group here": (lambda cells: cells.drop(columns="group_id"), "group_id of sample 's0' .*'s0'.*'p0' in cnv"),
    "split word": (_set(3, "split", "valid"), r"data row 4: split .*'valid'"),
    "group in both": (
        _set(1, "split", "train"),
        "data row 2: split of group 'p0' .*train.*test in cnv.parquet, data row 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_parquet_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    reported = refusal(import_changed(tmp_path, change))
    assert re.search(message, reported), reported


TEXT_WRONG: dict[str, tuple[str | bytes, str]] = {
    "not a number": (
        "sample_id,label,a,b\ns0,x,1,2\ns1,x,1,high\n",
        r"mirna.csv, line 3, column 'b': not a number: 'high'",
    ),
    "decimal comma": ('sample_id,label,a,b\ns0,x,1,"2,5"\n', r"line 2, column 'b': not a number: '2,5'"),
    "short row": ("sample_id,label,a,b\ns0,x,1,2\ns1,x,1\n", "mirna.csv, line 3: Expected 4 columns, got 3"),
    "infinity": ("sample_id,label,a,b\ns0,x,1,inf\n", "data row 1, sample 's0', feature 'b': infinite"),
    "too large": (
        "sample_id,label,a,b\ns0,x,1,1e39\n",
        "sample 's0', feature 'b': .*3.4e38",
    ),
    "large integer": (
        "sample_id,label,a,b\ns0,x,1,16777217\n",
        "data row 1, column 'b': integer 16777217",
    ),
    "same column twice": ("sample_id,label,a,a\ns0,x,1,2\n", r"columns 1 and 2 .*\('a', 'a'\)"),
    "metadata twice": ("sample_id,label,label,a\ns0,x,x,2\n", r"mirna.csv: column label .*\(2 times\)"),
    "R row names": (",sample_id,label,a\n1,s0,x,2\n", "mirna.csv: column 1 has no name"),
    "missing id": ("sample_id,label,a\nNA,x,1\n", "data row 1: sample_id is missing"),
    "fraction label": ("sample_id,label,a\ns0,1.5,1\n", "data row 1: label '1.5'"),
    "empty": ("", "mirna.csv: empty file"),
    "header only": ("sample_id,label,a\n", "mirna.csv: no rows"),
    "latin 1 header": ("sample_id,label,caf\xe9\ns0,x,1\n".encode("latin-1"), "mirna.csv: not UTF-8"),
    "latin 1 cell": ("sample_id,label,a\ns\xe9,x,1\n".encode("latin-1"), "mirna.csv: not UTF-8"),
    "UTF-16": ("sample_id,label,a\ns0,x,1\n".encode("utf-16"), "mirna.csv: not UTF-8"),
    "semicolons": ("sample_id;label;a\ns0;x;1\n", "mirna.csv: no column sample_id"),
    "spreadsheet": (b"PK\x03\x04rest", "mirna.csv: .*ZIP"),
    "compressed": (gzip.compress(b"sample_id,label,a\ns0,x,1\n"), r"mirna.csv: .*gzip.*\.gz"),
}


@pytest.mark.parametrize("name", TEXT_WRONG)
def test_an_invalid_text_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    text, message = TEXT_WRONG[name]
    write(tmp_path / "source", "zcnv.parquet", frame(1))
    (tmp_path / "source" / "mirna.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    reported = refusal(tmp_path / "source")
    assert re.search(message, reported), reported


def test_a_bad_cell_in_a_late_text_block_is_named_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "TEXT_BLOCK_BYTES", 1000)
    cells = frame(rows=300).astype({"MYC": object})
    cells.loc[250, "MYC"] = "many"
    write(tmp_path / "source", "mirna.tsv.gz", cells)
    assert "mirna.tsv.gz, line 252, column 'MYC': not a number: 'many'" in refusal(tmp_path / "source")


def test_a_late_cell_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    lines = [f"s{i},x,1\n".encode() for i in range(20_000)]
    lines[15_000] = b"\xe9,x,1\n"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "mirna.csv").write_bytes(b"sample_id,label,a\n" + b"".join(lines))
    assert "mirna.csv, line 15002, column 'sample_id': invalid UTF8 data" in refusal(tmp_path / "source")


def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "mirna.csv").write_text("sample_id,label,a\r\ns0,x,1\r\n", encoding="utf-8-sig", newline="")
    assert imported(tmp_path / "source").read("mirna").tolist() == [[1.0]]


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_compressed_file_is_refused(tmp_path: Path, share: float) -> None:
    write(tmp_path / "source", "mirna.csv.gz", frame(rows=300))
    file = tmp_path / "source" / "mirna.csv.gz"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert "mirna.csv.gz: cannot be read" in refusal(tmp_path / "source")


FOREIGN = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n": "Git LFS.*git lfs pull",
    b"<!DOCTYPE html><html><body>404</body></html>": "HTML",
    b"\n<html>": "HTML",
    b"sample_id,label,a\ns0,x,1\n": "not a .parquet file",
    b"\x1f\x8b\x08rest": "gzip",
    b"": "empty file",
    b"PAR1 and nothing more PAR1": "cannot be read",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_of_another_format_is_identified(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "source", "cnv.parquet", frame(1))
    (tmp_path / "source" / "mirna.parquet").write_bytes(content)
    reported = refusal(tmp_path / "source")
    assert "mirna.parquet" in reported and re.search(FOREIGN[content], reported), reported


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_parquet_file_is_refused(tmp_path: Path, share: float) -> None:
    write(tmp_path / "source", "mirna.parquet", frame(rows=200))
    file = tmp_path / "source" / "mirna.parquet"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert "mirna.parquet: cannot be read" in refusal(tmp_path / "source")


def test_text_that_is_not_utf8_inside_parquet_is_refused(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 2], np.int32).tobytes())
    broken = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    (tmp_path / "source").mkdir()
    table = pa.table({"sample_id": broken, "label": ["x"], "a": [1.0]})
    pq.write_table(table, tmp_path / "source" / "mirna.parquet")
    assert "mirna.parquet: cannot be read" in refusal(tmp_path / "source")


def test_a_column_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    file = tmp_path / "source" / "mirna.parquet"
    pq.write_table(pa.table({"sample_id": ["s"], "label": ["x"], "QQQQ": [1.0]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"QQQQ", b"\xff\xfe\xff\xfe"))
    assert "mirna.parquet: cannot be read" in refusal(tmp_path / "source")


# --- folders --------------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "regular file"),
        (_pipe, "regular file"),
        (_loop, "Too many levels of symbolic links"),
    ],
)
def test_an_entry_that_is_not_a_file_is_refused_without_blocking(
    tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    source = import_changed(tmp_path, lambda cells: cells)
    make(source / "x.parquet")
    assert re.search(f"x.parquet: .*{message}", refusal(source))


@pytest.mark.parametrize("name", ["mirna.parquet.tmp", "mirna.csv.crdownload", "mirna.parquet.part"])
def test_an_unfinished_copy_is_refused(tmp_path: Path, name: str) -> None:
    source = import_changed(tmp_path, lambda cells: cells)
    (source / name).write_text("x")
    assert f"{name}: " in refusal(source)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mirna.csv", "modality 'mirna' and 'mirna' "),
        ("MIRNA.parquet", "modality 'mirna' and 'MIRNA' "),
        ("-rf.parquet", "modality '-rf': "),
        ("a b.parquet", "modality 'a b': "),
        (f"{'x' * 65}.parquet", f"modality '{'x' * 65}': "),
    ],
)
def test_a_file_name_that_cannot_name_a_modality_is_refused(tmp_path: Path, name: str, message: str) -> None:
    source = import_changed(tmp_path, lambda cells: cells)
    write(source, name, frame(2))
    assert message in refusal(source)


def test_a_missing_an_empty_and_an_unknown_source_are_refused(tmp_path: Path) -> None:
    assert "absent: does not exist" in refusal(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: no tables" in refusal(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt: unknown format" in refusal(tmp_path / "notes.txt")


def test_a_mistake_in_the_last_file_leaves_the_source_unchanged_and_no_store(tmp_path: Path) -> None:
    source = import_changed(tmp_path, _set(10, "label", "OV"))
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    refusal(source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


# --- AnnData and MuData ---------------------------------------------------------------------------------------

needs_anndata = pytest.mark.skipif(importlib.util.find_spec("anndata") is None, reason="needs the extra anndata")


def annotated(matrix: str, cells: pd.DataFrame):  # type: ignore[no-untyped-def]
    import anndata
    from scipy import sparse

    make = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}[matrix]
    obs = cells[["label", "group_id", "split"]].set_axis(cells["sample_id"].to_numpy(), axis=0)
    obs["label"] = pd.Categorical(obs["label"])
    return anndata.AnnData(make(cells[FEATURES].to_numpy()), obs=obs, var=pd.DataFrame(index=FEATURES))


@needs_anndata
@pytest.mark.parametrize("matrix", ["dense", "csr", "csc"])
def test_an_anndata_file_gives_the_same_store_as_the_table(
    tmp_path: Path, matrix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "PIECE_BYTES", 5 * 4 * len(FEATURES))
    for name in ("a", "b"):
        (tmp_path / name / "source").mkdir(parents=True)
    annotated(matrix, frame()).write_h5ad(tmp_path / "a" / "source" / "mirna.h5ad")
    write(tmp_path / "b" / "source", "mirna.parquet", frame())
    stores = [imported(tmp_path / name / "source") for name in ("a", "b")]
    assert stores[0].fingerprint == stores[1].fingerprint


@pytest.mark.skipif(importlib.util.find_spec("mudata") is None, reason="needs the extra anndata")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_mudata_file_gives_a_modality_each_with_common_labels(tmp_path: Path) -> None:
    import mudata

    first, second = annotated("dense", frame()), annotated("csr", frame(1).iloc[2:9])
    mdata = mudata.MuData({"rna": first, "atac": second})
    mdata.obs["label"] = first.obs["label"]
    del mdata["atac"].obs["label"]
    mdata.write(tmp_path / "both.h5mu")
    store = imported(tmp_path / "both.h5mu")
    assert sorted(store.modalities) == ["atac", "rna"]
    assert store.read("atac").tobytes() == frame(1)[FEATURES].to_numpy(np.float32)[2:9].tobytes()
    assert store.index("atac").label.tolist() == store.index("rna").label.tolist()[2:9]
    assert store.index("atac").group_id.tolist() == [f"p{i // 2}" for i in range(2, 9)]


@needs_anndata
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells.obs.drop(columns="label", inplace=True), "mirna.h5ad: obs has no column label"),
        (lambda cells: cells.__setattr__("X", None), "mirna.h5ad: no matrix X"),
        (lambda cells: cells.__setattr__("X", np.ones((12, 4), bool)), "mirna.h5ad: X has type bool"),
        (
            lambda cells: cells.__setattr__("X", np.full((12, 4), 2**30)),
            "mirna.h5ad, data row 1, column 'TP53': integer 1073741824",
        ),
        (
            lambda cells: cells.__setattr__("X", np.full((12, 4), np.inf)),
            "sample 's0', feature 'TP53': infinite",
        ),
        (lambda cells: cells.__setattr__("obs_names", ["s0"] * 12), "data row 2: duplicate sample_id 's0'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_an_invalid_anndata_file_is_refused_by_name(
    tmp_path: Path, change: Callable[[object], None], message: str
) -> None:
    cells = annotated("dense", frame())
    change(cells)
    cells.write_h5ad(tmp_path / "mirna.h5ad")
    reported = refusal(tmp_path / "mirna.h5ad")
    assert message in reported, reported


@pytest.mark.parametrize("name", ["mirna.h5ad", "both.h5mu"])
def test_without_the_extra_the_error_names_it(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package, *a: None if package == "anndata" else real(package, *a)
    )
    assert "pip install 'modis-dist[anndata]'" in refusal(tmp_path / name)


@needs_anndata
def test_a_damaged_anndata_file_is_one_line(tmp_path: Path) -> None:
    annotated("dense", frame()).write_h5ad(tmp_path / "mirna.h5ad")
    whole = (tmp_path / "mirna.h5ad").read_bytes()
    (tmp_path / "mirna.h5ad").write_bytes(whole[: len(whole) // 2])
    assert "mirna.h5ad: cannot be read" in refusal(tmp_path / "mirna.h5ad")


@pytest.mark.shared
def test_the_real_tables_are_imported_bit_identical(tmp_path: Path, shared: Path) -> None:
    import_source(shared / "data" / "tcga10", tmp_path / "store", progress=lambda *_: None)
    store = Store.open(tmp_path / "store")
    assert len(store.classes) == 10
    for name in store.modalities:
        cells = pq.read_table(shared / "data" / "tcga10" / f"{name}.parquet").to_pandas()
        np.testing.assert_array_equal(store.read(name), cells[list(store.features(name))].to_numpy())
        assert [store.classes[code] for code in store.index(name).label] == cells["label"].tolist()
