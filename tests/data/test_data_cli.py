"""The `modis-dist data` commands: output, files and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from modis_dist.cli.data import app
from modis_dist.data.store.coverage import Coverage, measure, verify
from modis_dist.data.store.reader import Store
from modis_dist.data.store.writer import StoreWriter
from modis_dist.runtime.errors import ConfigError, DataError


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> str:
    """Return the one-line message of a user error."""
    result = run(*arguments)
    assert isinstance(result.exception, DataError | ConfigError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two modalities: six and four rows, one class in only one of them, one unlabelled row, one missing value."""
    folder = tmp_path / "source"
    folder.mkdir()
    mirna = pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(6)],
            "group_id": ["p0", "p0", "p1", "p2", "p3", "p4"],
            "label": ["A", "A", "10", "2", None, "B[red]"],
            "split": ["train"] * 3 + ["test"] * 2 + [None],
            "one": [1.0, 2, 3, 4, 5, -6],
            "two": [0.5] * 6,
        }
    )
    cnv = pd.DataFrame(
        {"sample_id": ["s0", "s1", "s2", "x"], "label": ["A", "A", "10", "2"], "group_id": ["p0", "p0", "p1", "p5"]}
    )
    mirna.to_csv(folder / "mirna.csv", index=False)
    cnv.assign(g1=[1.0, np.nan, 3.0, 4.0]).to_parquet(folder / "cnv.parquet", index=False)
    return folder


@pytest.fixture
def store(source: Path, tmp_path: Path) -> Path:
    assert run("import", source, "--out", tmp_path / "store").exit_code == 0
    return tmp_path / "store"


def test_import_prints_the_store_its_notices_and_the_next_command(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "my store"
    result = run("import", source, "--out", out)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "cnv: 4 rows, 1 features",
        "mirna: 6 rows, 2 features",
        "notice: cnv.parquet: 1 missing value(s) (25.00%)",
        f"store: {out}",
        f"next:  modis-dist data describe '{out}'",
    ]
    assert result.stderr == ""  # no progress bars without a terminal


def test_import_refuses_an_existing_target_and_a_wrong_source(store: Path, source: Path, tmp_path: Path) -> None:
    assert "already exists" in refused("import", source, "--out", store)
    assert "does not exist" in refused("import", tmp_path / "absent", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_check_of_a_valid_store_prints_its_contents(store: Path) -> None:
    result = run("check", store)
    assert result.exit_code == 0
    assert "mirna: 6 rows, 2 features, 1 shard(s): OK" in result.stdout
    tree = json.loads(run("check", store, "--json").stdout)
    assert tree["ok"] is True
    assert tree["fingerprint"] == Store.open(store).fingerprint
    assert tree["modalities"]["cnv"] == {"rows": 4, "features": 1, "shards": 1}


def test_check_ignores_earlier_verifications(store: Path) -> None:
    Store.open(store)
    shard = store / "mirna" / "part-00000.parquet"
    status, content = shard.stat(), bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    Store.open(store)  # cannot see it
    assert "mirna/part-00000.parquet: modified" in refused("check", store)


def test_check_finds_invalid_rows_of_another_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(out: Path, *, ids: list[str], value: float) -> None:
        with StoreWriter(out, source={}) as writer:
            writer.begin("mirna", ["a"])
            x = np.full((len(ids), 1), value, np.float32)
            writer.write("mirna", sample_id=ids, group_id=ids, label=["c"] * len(ids), split=[""] * len(ids), x=x)

    with monkeypatch.context() as patch:
        patch.setattr("modis_dist.data.store.writer.check_finite", lambda *_, **__: None)
        patch.setattr("modis_dist.data.store.rules.Ledger._add_sample", lambda *_: None)
        write(tmp_path / "infinite", ids=["s"], value=np.inf)
        write(tmp_path / "twice", ids=["s", "s"], value=1.0)
    assert "mirna, data row 1, sample 's', feature 'a': infinite" in refused("check", tmp_path / "infinite")
    assert "mirna, data row 2: duplicate sample_id 's'" in refused("check", tmp_path / "twice")


def test_describe_counts_like_pandas(store: Path, source: Path) -> None:
    tree = json.loads(run("describe", store, "--json").stdout)
    assert tree["classes"] == ["2", "10", "A", "B[red]"]
    for name, table in (("mirna", pd.read_csv(source / "mirna.csv")), ("cnv", pd.read_parquet(source / "cnv.parquet"))):
        described = tree["modalities"][name]
        x = table.drop(columns=["sample_id", "group_id", "label", "split"], errors="ignore").to_numpy()
        counts = table["label"].astype(object).value_counts()
        assert {label: n for label, n in described["by_class"].items() if n} == counts.to_dict()
        assert described["unlabelled"] == table["label"].isna().sum()
        assert described["labelled_fraction"] == pytest.approx(table["label"].notna().mean())
        assert (described["minimum"], described["maximum"]) == (np.nanmin(x), np.nanmax(x))
        assert described["mean"] == pytest.approx(np.nanmean(x))
        assert described["missing"] == np.isnan(x).sum()
        assert described["missing_fraction"] == pytest.approx(np.isnan(x).mean())
        assert described["groups"] == table["group_id"].nunique()
    assert tree["modalities"]["mirna"]["by_split"] == {"train": 3, "test": 2, "none": 1}
    assert tree["modalities"]["mirna"]["constant_features"] == 1
    assert tree["empty_pairs"] == [{"label": "B[red]", "modality": "cnv"}]
    assert tree["samples"] == 7 and tree["by_modality_count"] == {"1": 4, "2": 3}


def test_describe_shows_a_table_with_the_empty_pair_and_names_as_text(store: Path) -> None:
    lines = run("describe", store).stdout.splitlines()
    row = next(line for line in lines if "B[red]" in line)
    assert row.split("│")[2].strip() == "none" and row.split("│")[3].strip() == "1"
    assert any("unlabelled" in line and line.split("│")[3].strip() == "1" for line in lines)
    assert "3 samples have rows in 2 of 2 modalities" in lines
    assert "notice: cnv.parquet: 1 missing value(s) (25.00%)" in lines


def test_a_modality_without_values_has_no_range(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", source={}) as writer:
        writer.begin("mirna", ["a"])
        x = np.full((1, 1), np.nan, np.float32)
        writer.write("mirna", sample_id=["s"], group_id=["s"], label=[None], split=[""], x=x)
    coverage: Coverage = measure(Store.open(tmp_path / "store"), progress=lambda *_: None)
    assert coverage.modalities["mirna"].minimum is None and coverage.modalities["mirna"].missing_fraction == 1
    assert run("describe", tmp_path / "store").exit_code == 0
    assert json.loads(run("describe", tmp_path / "store", "--json").stdout)["modalities"]["mirna"]["mean"] is None


def test_simulate_writes_a_valid_store(tmp_path: Path) -> None:
    out = tmp_path / "simulated"
    result = run(
        "simulate", "intersim", "--out", out, "--samples", "60", "--classes", "3", "--delta", "0.5", "--seed", "1"
    )
    assert result.exit_code == 0 and f"store: {out}" in result.stdout
    store = verify(out, progress=lambda *_: None)
    assert store.classes == ("1", "2", "3") and store.rows("protein") == 60
    assert store.created["source"]["settings"]["delta"] == 0.5


def test_simulate_refuses_settings_out_of_range_by_their_key(tmp_path: Path) -> None:
    assert "samples: must be >= 10" in refused("simulate", "intersim", "--out", tmp_path / "x", "--samples", "3")
    assert "no file mean.M.parquet" in refused("simulate", "intersim", "--out", tmp_path / "x", "--reference", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_commands_import_nothing_heavy_until_they_run() -> None:
    heavy = "{'torch', 'pyarrow', 'numpy', 'pandas', 'anndata', 'sklearn'}"
    code = f"import sys, modis_dist.cli.data; print(sorted({heavy} & set(sys.modules)))"
    imported_modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert imported_modules.stdout.strip() == "[]"
