"""Simulation: classes, shifts, maps and covariances are as described."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from modis_dist.config.run import Simulate
from modis_dist.data import simulate as simulator
from modis_dist.data.simulate import OMICS, Tables, class_means, class_sizes, from_folder, generated, simulate
from modis_dist.data.store.reader import Store
from modis_dist.runtime.errors import DataError

Array = NDArray[np.float64]


def simulated(out: Path, **settings: object) -> Store:
    simulate(Simulate.model_validate(settings), out)
    return Store.open(out)


def rows_of(store: Store, omic: str) -> Array:
    """Return rows on the scale of the shift."""
    x = store.read(omic).astype(np.float64)
    return np.log(x / (1 - x)) if omic == "methylation" else x


def tables_of(seed: int) -> Tables:
    return generated(np.random.default_rng(seed))


# --- the structure of every simulated store -------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulated(tmp_path_factory.mktemp("small") / "store", samples=1500, classes=3, delta=2.0, seed=7)


def test_a_store_is_paired_complete_and_balanced(small: Store) -> None:
    assert small.modalities == ("methylation", "expression", "protein")
    assert [len(small.features(omic)) for omic in OMICS] == [367, 131, 160]
    assert small.classes == ("1", "2", "3")
    first = small.index("methylation")
    assert first.sample_id.tolist() == [f"subject{i + 1}" for i in range(1500)]
    for omic in OMICS:
        assert small.index(omic).sample_id.tolist() == first.sample_id.tolist()
        assert small.index(omic).label.tolist() == first.label.tolist()
        assert np.isfinite(small.read(omic)).all()
    assert np.bincount(first.label).tolist() == [500, 500, 500]
    assert (np.diff(first.label) != 0).sum() > 500  # shuffled, not in blocks
    methylation = small.read("methylation")
    assert methylation.min() >= 0 and methylation.max() <= 1


def test_class_shifts_are_zero_or_delta_and_follow_the_gene_maps(small: Store) -> None:
    tables = intersim_tables(seed=7)
    label = small.index("methylation").label
    shifted = {}
    for omic in OMICS:
        base = class_means(tables, omic, np.zeros((len(tables.mean[omic]), 1), dtype=bool), 2.0)[0]
        x = rows_of(small, omic)
        shifts = np.stack([x[label == k].mean(axis=0) - base for k in range(3)])
        spread = np.sqrt(np.diag(tables.covariance[omic]) / 500)
        shifted[omic] = shifts > 1
        assert (np.abs(shifts - 2 * shifted[omic]) < 5 * spread).all()
    for k in range(3):
        genes = np.zeros(131, dtype=bool)
        genes[tables.gene_of_cpg[shifted["methylation"][k]]] = True
        assert (shifted["expression"][k] == genes).all()
        assert (shifted["protein"][k] == genes[tables.gene_of_protein]).all()
    assert len({tuple(row) for row in shifted["methylation"]}) == 3


def intersim_tables(seed: int) -> Tables:
    """Return the tables of a simulation with this seed."""
    return generated(np.random.default_rng(np.random.SeedSequence(seed).spawn(6)[0]))


def test_given_the_class_the_omics_of_a_sample_are_independent(small: Store) -> None:
    label = small.index("methylation").label
    tables = intersim_tables(seed=7)
    methylation, expression = rows_of(small, "methylation"), rows_of(small, "expression")
    rows = label == 0
    correlation = [
        np.corrcoef(methylation[rows, cpg], expression[rows, gene])[0, 1] for cpg, gene in enumerate(tables.gene_of_cpg)
    ]
    assert abs(np.mean(correlation)) < 0.02
    assert np.std(correlation) == pytest.approx(1 / np.sqrt(500), rel=0.2)


def test_without_a_shift_classes_are_equal_and_means_are_uncorrelated(tmp_path: Path) -> None:
    store = simulated(tmp_path / "store", samples=2000, classes=2, delta=0, seed=3)
    tables = intersim_tables(seed=3)
    for omic in OMICS:
        x = rows_of(store, omic)
        error = np.sqrt(np.diag(tables.covariance[omic]) / len(x))
        assert (np.abs(x.mean(axis=0) - tables.mean[omic]) < 5 * error).all()


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    stores = [simulated(tmp_path / f"{i}", samples=60, classes=3, seed=seed) for i, seed in enumerate((5, 5, 6))]
    assert stores[0].fingerprint == stores[1].fingerprint != stores[2].fingerprint
    for file in ("methylation/part-00000.parquet", "protein/part-00000.parquet"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()


def test_rows_do_not_depend_on_the_chunk_they_are_drawn_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulated(tmp_path / "whole", samples=100, classes=4, seed=1).read("expression")
    monkeypatch.setattr(simulator, "CHUNK_ROWS", 7)
    np.testing.assert_allclose(
        simulated(tmp_path / "cut", samples=100, classes=4, seed=1).read("expression"), whole, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("samples", "classes", "sizes"),
    [(10, 2, [5, 5]), (11_500, 5, [2300] * 5), (25, 2, [12, 13]), (35, 2, [18, 17]), (100, 3, [33, 33, 34])],
)
def test_class_sizes_are_rounded_half_to_even_and_the_last_class_gets_the_rest(
    samples: int, classes: int, sizes: list[int]
) -> None:
    assert class_sizes(samples, classes).tolist() == sizes


@pytest.mark.parametrize(("samples", "classes"), [(10, 6), (10, 16), (10, 1000), (35, 10)])
def test_an_empty_class_is_refused_before_anything_is_written(tmp_path: Path, samples: int, classes: int) -> None:
    with pytest.raises(DataError, match=rf"^samples: {samples} .* {classes}$"):
        simulated(tmp_path / "store", samples=samples, classes=classes)
    assert list(tmp_path.iterdir()) == []


# --- generated tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_generated_tables_have_the_structure_of_the_originals(seed: int) -> None:
    tables = tables_of(seed)
    sizes = {"methylation": 367, "expression": 131, "protein": 160}
    extremes = {"methylation": (5e-5, 80), "expression": (0.02, 6.5), "protein": (0.002, 7.5)}
    for omic in OMICS:
        assert len(set(tables.names[omic])) == len(tables.mean[omic]) == sizes[omic]
        covariance = tables.covariance[omic]
        assert (covariance == covariance.T).all()
        values = np.linalg.eigvalsh(covariance)
        assert values[[0, -1]] == pytest.approx(extremes[omic], rel=1e-3)
        assert 0.2 < np.trace(covariance) / sizes[omic] < 1
    cpgs, proteins = (np.bincount(m, minlength=131) for m in (tables.gene_of_cpg, tables.gene_of_protein))
    assert len(cpgs) == len(proteins) == 131
    assert cpgs.min() == proteins.min() == 1 and cpgs.max() <= 19 and proteins.max() <= 3
    assert cpgs.sum() == 367 and proteins.sum() == 160
    assert tables.rho_expression.min() >= -0.91 and tables.rho_expression.max() <= 0.25
    assert tables.rho_protein.min() >= -0.22 and tables.rho_protein.max() <= 0.83
    assert len(tables.gene_methylation) == 131


# --- tables from a folder -------------------------------------------------------------------------------------


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """Write a folder of small tables in the layout of the originals."""
    folder = tmp_path / "params"
    folder.mkdir()
    genes, cpgs, proteins = ["A", "B"], ["c1", "c2", "c3"], ["p1", "p2"]

    def vector(name: str, names: list[str], values: list[float]) -> None:
        pq.write_table(pa.table({"name": names, "value": values}), folder / f"{name}.parquet")

    def matrix(name: str, names: list[str]) -> None:
        table = {"name": pa.array(names)} | dict(zip(names, (pa.array(row) for row in np.eye(len(names))), strict=True))
        pq.write_table(pa.table(table), folder / f"{name}.parquet")

    for suffix, names in (("M", cpgs), ("expr", genes), ("protein", proteins)):
        vector(f"mean.{suffix}", names, [float(i) for i in range(len(names))])
        matrix(f"cov.{suffix}", names)
    vector("methyl.gene.level.mean", genes, [1.0, -1.0])
    vector("rho.methyl.expr", genes, [0.6, 0.0])
    vector("rho.expr.protein", proteins, [0.0, 0.8])
    cpg_map = {"rowname": ["c3", "c1", "c2"], "tmp.cg": cpgs, "tmp.gene": ["B", "A", "A"]}
    pq.write_table(pa.table(cpg_map), folder / "CpG.gene.map.for.DEG.parquet")
    protein_map = {"rowname": ["p2", "p1"], "protein": ["p1", "p2"], "gene": ["A", "B"]}
    pq.write_table(pa.table(protein_map), folder / "protein.gene.map.for.DEP.parquet")
    return folder


def test_maps_are_joined_by_row_name_not_by_position_or_spelling(params: Path) -> None:
    tables = from_folder(params)
    assert tables.gene_of_cpg.tolist() == [0, 0, 1]
    assert tables.gene_of_protein.tolist() == [1, 0]


def test_base_means_mix_upstream_mean_and_base_mean_by_the_correlation(params: Path) -> None:
    tables = from_folder(params)
    none = np.zeros((2, 1), dtype=bool)
    # gene A: .6 * 1 + .8 * 0; gene B: 0 * -1 + 1 * 1.  protein p2 maps to gene A (mean 0): .8 * 0 + .6 * 1.
    assert class_means(tables, "expression", none, 2.0)[0] == pytest.approx([0.6, 1.0])
    assert class_means(tables, "protein", none, 2.0)[0] == pytest.approx([0.0, 0.6])
    assert class_means(tables, "expression", none, 0.0)[0] == pytest.approx([0.0, 1.0])
    assert class_means(tables, "protein", ~none, 0.5)[0] == pytest.approx([0.5, 1.1])


def _rewrite(folder: Path, name: str, columns: dict[str, list[object]]) -> None:
    file = folder / f"{name}.parquet"
    values = pq.read_table(file).to_pydict() | columns
    pq.write_table(pa.table(values), file)


@pytest.mark.parametrize(
    ("name", "columns", "message"),
    [
        ("mean.expr", {"value": [float("nan"), 1.0]}, "reference mean.expr: "),
        ("rho.methyl.expr", {"value": [1.5, 0.0]}, "reference rho.methyl.expr: "),
        (
            "rho.expr.protein",
            {"name": ["p2", "p1"]},
            "reference rho.expr.protein: ",
        ),
        ("cov.expr", {"A": [-1.0, 0.0]}, "reference cov.expr: "),
        ("cov.expr", {"B": [0.5, 1.0]}, "reference cov.expr: "),
        ("cov.M", {"name": ["c1", "c2", "other"]}, "reference cov.M: "),
        ("CpG.gene.map.for.DEG", {"tmp.gene": ["Z", "A", "A"]}, r"reference CpG.gene.map.for.DEG: 'c3' .*\(1 "),
    ],
)
def test_invalid_tables_are_refused_by_name(
    params: Path, name: str, columns: dict[str, list[object]], message: str
) -> None:
    _rewrite(params, name, columns)
    with pytest.raises(DataError, match=message):
        from_folder(params)


def test_a_missing_or_damaged_table_is_named(params: Path, tmp_path: Path) -> None:
    (params / "mean.protein.parquet").write_text("x")
    with pytest.raises(DataError, match=r"mean\.protein\.parquet: "):
        from_folder(params)
    (params / "mean.protein.parquet").unlink()
    with pytest.raises(DataError, match=r"mean\.protein\.parquet"):
        simulated(tmp_path / "store", reference=str(params))


# --- published statistics, with the original tables -----------------------------------------------------------


@pytest.mark.shared
def test_the_original_tables_give_the_published_statistics(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data" / "intersim_params"
    store = simulated(tmp_path / "store", samples=11_500, classes=5, delta=2.0, seed=1234, reference=str(folder))
    tables = from_folder(folder)
    label = store.index("protein").label
    assert np.bincount(label).tolist() == [2300] * 5
    shifted = {}
    for omic, error in zip(OMICS, (0.056, 0.120, 0.095), strict=True):
        x = rows_of(store, omic)
        base = class_means(tables, omic, np.zeros((x.shape[1], 1), dtype=bool), 2.0)[0]
        shifts = np.stack([x[label == k].mean(axis=0) - base for k in range(5)])
        shifted[omic] = shifts > 1
        assert np.abs(shifts - 2 * shifted[omic]).max() < 0.1
        sample = np.cov(x[label == 0], rowvar=False)
        deviation = np.linalg.norm(sample - tables.covariance[omic]) / np.linalg.norm(tables.covariance[omic])
        assert deviation == pytest.approx(error, rel=0.15)
    counts = shifted["methylation"].sum(axis=1)
    assert (np.abs(counts - 73.4) < 4 * np.sqrt(367 * 0.2 * 0.8)).all()
    for k in range(5):
        genes = np.isin(np.arange(131), tables.gene_of_cpg[shifted["methylation"][k]])
        assert (shifted["expression"][k] == genes).all()
        assert (shifted["protein"][k] == genes[tables.gene_of_protein]).all()
    assert shifted["expression"].sum(axis=1).mean() == pytest.approx(52.5, abs=6)
    assert shifted["protein"].sum(axis=1).mean() == pytest.approx(64.1, abs=8)
    for omic, low, high, mean in (
        ("methylation", 0, 1, 0.256),
        ("expression", -7.44, 10.62, 0.735),
        ("protein", -6.47, 10.90, 0.714),
    ):
        x = store.read(omic)
        assert x.min() == pytest.approx(low, abs=1.5) and x.max() == pytest.approx(high, abs=1.5)
        assert x.mean() == pytest.approx(mean, abs=0.05)
