"""Splits: whole groups, balanced cells, independent of the order of rows."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modis_dist.config.run import Split
from modis_dist.data import hash_order
from modis_dist.data.split import Partition, partition
from modis_dist.data.store.index import Index
from modis_dist.runtime.errors import DataError
from tests.data.cohorts import index_of, random_cohort, reordered

SEEDS = st.integers(0, 2**32)
COHORTS = st.builds(
    random_cohort,
    SEEDS,
    groups=st.integers(8, 60),
    classes=st.integers(1, 5),
    modalities=st.integers(2, 4),
    samples_per_group=st.integers(1, 3),
    unlabelled=st.sampled_from([0.0, 0.2]),
).filter(lambda indexes: min(map(len, indexes.values())) >= 8)  # with fewer rows, a modality may have no training rows
FRACTIONS = st.sampled_from([0.1, 0.2, 1 / 3, 0.5])


def groups_of(indexes: dict[str, Index], parts: dict[str, Partition], side: str) -> set[str]:
    return {group for name, part in parts.items() for group in indexes[name].group_id[getattr(part, side)]}


def samples_of(indexes: dict[str, Index], parts: dict[str, Partition], side: str) -> dict[str, set[str]]:
    return {name: set(indexes[name].sample_id[getattr(part, side)]) for name, part in parts.items()}


def assert_whole(indexes: dict[str, Index], parts: dict[str, Partition]) -> None:
    """Check that sides are sorted, disjoint and complete, and that every group is on one side."""
    sides = ("train", "validation", "test")
    for name, part in parts.items():
        rows = [getattr(part, side) for side in sides]
        assert all(numbers.dtype == np.int64 and (np.diff(numbers) > 0).all() for numbers in rows)
        assert sorted(np.concatenate(rows)) == list(range(len(indexes[name])))
    drawn = [groups_of(indexes, parts, side) for side in sides]
    assert sum(map(len, drawn)) == len(set().union(*drawn))


# --- keyed ranks ----------------------------------------------------------------------------------------------


@given(st.sets(st.text(max_size=8), max_size=30), st.text(max_size=100), SEEDS)
def test_ranks_do_not_depend_on_the_order_or_on_other_ids(ids: set[str], key: str, seed: int) -> None:
    some = np.array(sorted(ids), dtype=object)
    rank = hash_order.ranks(some, key=key)
    assert sorted(rank) == list(range(len(some)))
    order = np.random.default_rng(seed).permutation(len(some))
    assert (hash_order.ranks(some[order], key=key) == rank[order]).all()
    rest = np.flatnonzero(np.arange(len(some)) % 3 > 0)
    assert (np.argsort(hash_order.ranks(some[rest], key=key)) == np.argsort(rank[rest])).all()


def test_ranks_are_equal_on_every_machine_and_version() -> None:
    ids = np.array(["a", "b", "c", "é", ""], dtype=object)
    assert hash_order.ranks(ids, key="k").tolist() == [0, 3, 2, 4, 1]


def test_first_by_rank_is_a_uniform_choice() -> None:
    ids = np.array([f"s{number}" for number in range(40)], dtype=object)
    chosen = np.array([hash_order.ranks(ids, key=str(key)) < 10 for key in range(2000)])
    assert (chosen.sum(axis=1) == 10).all()
    # 2,000 draws of probability 1/4: standard deviation 0.0097, so five of them.
    assert np.abs(chosen.mean(axis=0) - 0.25).max() < 0.049


# --- properties over random cohorts ---------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(COHORTS, FRACTIONS, st.sampled_from([0.0, 0.15, 0.3]), SEEDS)
def test_groups_stay_whole_and_all_rows_are_used(
    indexes: dict[str, Index], fraction: float, validation: float, seed: int
) -> None:
    parts = partition(indexes, Split(test_fraction=fraction, validation_fraction=validation, seed=seed))
    assert_whole(indexes, parts)
    assert validation > 0 or not groups_of(indexes, parts, "validation")


@settings(max_examples=200, deadline=None)
@given(COHORTS, FRACTIONS, SEEDS)
def test_the_test_fraction_of_every_class_and_modality_is_near_the_target(
    indexes: dict[str, Index], fraction: float, seed: int
) -> None:
    parts = partition(indexes, Split(test_fraction=fraction, seed=seed))
    largest = max(np.unique(index.group_id, return_counts=True)[1].max() for index in indexes.values())
    for name, index in indexes.items():
        for label in np.unique(index.label):
            drawn = (index.label[parts[name].test] == label).sum()
            assert abs(drawn - fraction * (index.label == label).sum()) < 2.5 + (largest > 1) * 2
        assert abs(len(parts[name].test) - fraction * len(index)) < 2.5 + (largest > 1) * 2


def cells_of_groups(indexes: dict[str, Index]) -> dict[str, Counter[object]]:
    """Return the units that each group adds to every cell."""
    brings: dict[str, Counter[object]] = {}
    for name, index in indexes.items():
        for group, label in zip(index.group_id, index.label.tolist(), strict=True):
            cells = brings.setdefault(group, Counter({"groups": 1}))
            cells[name, label] += 1
            cells[name] += 1
            cells[label] = 1
    return brings


@settings(max_examples=100, deadline=None)
@given(COHORTS, FRACTIONS, SEEDS)
def test_no_move_of_a_group_improves_the_split(indexes: dict[str, Index], fraction: float, seed: int) -> None:
    parts = partition(indexes, Split(test_fraction=fraction, validation_fraction=0, seed=seed))
    brings = cells_of_groups(indexes)
    test = groups_of(indexes, parts, "test")
    error: dict[object, float] = defaultdict(float)
    for group, cells in brings.items():
        for cell, units in cells.items():
            error[cell] += units * ((group in test) - fraction)
    for group, cells in brings.items():
        way = -1 if group in test else 1
        assert sum((error[cell] + way * units) ** 2 - error[cell] ** 2 for cell, units in cells.items()) > -1e-6


@settings(max_examples=200, deadline=None)
@given(COHORTS, SEEDS, SEEDS)
def test_the_order_of_rows_and_modalities_does_not_matter(indexes: dict[str, Index], seed: int, order: int) -> None:
    split = Split(seed=seed, validation_fraction=0.25)
    other = reordered(indexes, order)
    parts, again = partition(indexes, split), partition(other, split)
    assert list(again) == list(other)
    for side in ("train", "validation", "test"):
        assert samples_of(indexes, parts, side) == samples_of(other, again, side)


@settings(max_examples=50, deadline=None)
@given(COHORTS, st.integers(2, 4), SEEDS)
def test_every_training_group_validates_in_exactly_one_fold(indexes: dict[str, Index], folds: int, seed: int) -> None:
    splits = [Split(test_fraction=0.2, folds=folds, fold=fold, seed=seed) for fold in range(folds)]
    try:
        parts = [partition(indexes, split) for split in splits]
    except DataError as error:
        assert "folds: class " in str(error) and f"{folds} folds" in str(error)
        return
    for part in parts:
        assert_whole(indexes, part)
    validated = [groups_of(indexes, part, "validation") for part in parts]
    everyone = groups_of(indexes, parts[0], "train") | validated[0]
    assert set().union(*validated) == everyone and sum(map(len, validated)) == len(everyone)
    assert len({frozenset(groups_of(indexes, part, "test")) for part in parts}) == 1
    largest = max(Counter(sample for index in indexes.values() for sample in index.group_id).values())
    assert max(map(len, validated)) - min(map(len, validated)) <= max(4, largest)  # rows are shared out before groups


# --- single cases ---------------------------------------------------------------------------------------------


def one_class_a_group(groups: int, classes: int) -> dict[str, Index]:
    rows = [(f"s{number}", f"g{number}", number % classes) for number in range(groups)]
    return {"rna": index_of(rows), "protein": index_of(rows)}


def test_equal_groups_are_drawn_exactly() -> None:
    indexes = one_class_a_group(100, 5)
    parts = partition(indexes, Split(test_fraction=0.2, validation_fraction=0.25))
    for side, count in (("test", 4), ("validation", 4), ("train", 12)):
        rows = getattr(parts["rna"], side)
        assert np.bincount(indexes["rna"].label[rows]).tolist() == [count] * 5
        assert (rows == getattr(parts["protein"], side)).all()


def test_another_seed_draws_other_rows_even_for_distinct_groups() -> None:
    indexes = random_cohort(3, groups=40, classes=4, modalities=4, samples_per_group=4, unlabelled=0.3)
    drawn = [partition(indexes, Split(seed=seed))["m0"].test.tolist() for seed in range(5)]
    assert len({tuple(rows) for rows in drawn}) == 5


def test_groups_of_a_class_are_drawn_equally_often() -> None:
    indexes = one_class_a_group(30, 2)
    often = np.zeros(30)
    for seed in range(400):
        often[partition(indexes, Split(test_fraction=0.3, seed=seed))["rna"].test] += 1
    # 400 draws of probability 0.3: standard deviation 9.2, so five of them.
    assert np.abs(often - 120).max() < 46


def test_folds_draw_the_same_test_rows_as_one_validation_split() -> None:
    indexes = one_class_a_group(60, 3)
    folded = partition(indexes, Split(folds=3, fold=1, seed=4))
    assert (folded["rna"].test == partition(indexes, Split(seed=4))["rna"].test).all()


def test_a_stored_split_is_used_unchanged() -> None:
    rows = [("a", "a", 0), ("b", "b", 1), ("c", "c", 0)]
    indexes = {"rna": index_of(rows, ["train", "test", ""]), "cnv": index_of(rows[:2], ["train", "test"])}
    parts = partition(indexes, Split(test="stored", validation_fraction=0))
    assert parts["rna"].test.tolist() == [1] and parts["rna"].train.tolist() == [0, 2]
    assert parts["cnv"].test.tolist() == [1] and parts["cnv"].validation.tolist() == []


def test_none_leaves_no_test_rows() -> None:
    parts = partition(one_class_a_group(20, 2), Split(test="none", validation_fraction=0))
    assert len(parts["rna"].test) == 0 and len(parts["rna"].train) == 20


def test_a_stored_split_that_divides_a_patient_is_refused() -> None:
    rna = index_of([("a1", "patient", 0), ("b", "b", 0)], ["test", "train"])
    cnv = index_of([("a2", "patient", 0)], ["train"])
    with pytest.raises(DataError, match=r"split: .*\b1\b.*\(patient\)"):
        partition({"rna": rna, "cnv": cnv}, Split(test="stored"))


def test_a_stored_split_without_test_rows_is_refused() -> None:
    with pytest.raises(DataError, match=r"split: .*'test'.*data\.split\.test"):
        partition(one_class_a_group(10, 2), Split(test="stored"))


def test_a_class_with_fewer_groups_than_folds_is_refused_by_name_and_count() -> None:
    rows = [(f"s{number}", f"g{number}", int(number < 3)) for number in range(40)]
    indexes = {"rna": index_of(rows), "cnv": index_of(rows)}
    split = Split(test="none", folds=5, fold=0)
    with pytest.raises(DataError, match=r"\bKIRC\b.*\b3 .*\b5 folds"):
        partition(indexes, split, classes=["BRCA", "KIRC"])
    with pytest.raises(DataError, match=r"\b1 has 3 "):
        partition(indexes, split)


def test_unlabelled_groups_need_not_fill_the_folds() -> None:
    rows = [(f"s{number}", f"g{number}", -1 if number == 0 else 0) for number in range(10)]
    parts = partition({"rna": index_of(rows)}, Split(test="none", folds=3, fold=0))
    assert len(parts["rna"].validation) in {3, 4}


def test_a_modality_without_training_rows_is_refused() -> None:
    rows = [(f"s{number}", f"g{number}", 0) for number in range(3)]
    indexes = {"rna": index_of(rows, ["train", "test", "train"]), "cnv": index_of(rows[1:2], ["test"])}
    with pytest.raises(DataError, match=r"data\.split: .*\bcnv\b.*\b1 test .*\b0 validation .*\b1\b"):
        partition(indexes, Split(test="stored"))


# --- real data ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tcga10(shared: Path) -> dict[str, Index]:
    indexes = {}
    for name in ("mirna", "cnv", "rppa"):
        table = pq.read_table(
            shared / "data" / "tcga10" / f"{name}.parquet", columns=["sample_id", "label"]
        ).to_pydict()
        codes = np.unique(table["label"], return_inverse=True)[1].tolist()
        indexes[name] = index_of(list(zip(table["sample_id"], table["sample_id"], codes, strict=True)))
    return indexes


@pytest.mark.shared
@pytest.mark.parametrize("seed", range(3))
def test_tcga_test_fractions_are_within_half_a_point_and_patients_stay_whole(
    tcga10: dict[str, Index], seed: int
) -> None:
    parts = partition(tcga10, Split(test_fraction=0.2, seed=seed))
    assert_whole(tcga10, parts)
    for name, index in tcga10.items():
        count = np.bincount(index.label)
        assert count.min() > 200
        assert np.abs(np.bincount(index.label[parts[name].test]) / count - 0.2).max() < 0.005


@pytest.mark.shared
def test_tcga_folds_differ_by_at_most_three_rows_of_a_class(tcga10: dict[str, Index]) -> None:
    folds = [partition(tcga10, Split(folds=5, fold=fold)) for fold in range(5)]
    for name, index in tcga10.items():
        counts = np.array([np.bincount(index.label[fold[name].validation]) for fold in folds])
        assert (counts.max(axis=0) - counts.min(axis=0)).max() <= 3
