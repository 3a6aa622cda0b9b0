"""Scenarios: exact counts, nested levels, unchanged classes, training rows only."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modis_dist.config.run import Run
from modis_dist.data.scenario import TrainingRows, absent_pairs, apply
from modis_dist.data.store.index import Index, Rows
from modis_dist.runtime.errors import ConfigError
from tests.data.cohorts import index_of, random_cohort, reordered

CLASSES = ("c0", "c1", "c2", "c3")
SEEDS = st.integers(0, 2**32)
COHORTS = st.builds(
    random_cohort,
    SEEDS,
    groups=st.integers(40, 80),
    classes=st.integers(1, 4),
    modalities=st.integers(2, 4),
    samples_per_group=st.integers(1, 2),
    unlabelled=st.sampled_from([0.0, 0.2]),
)


def steps(*written: Any) -> Any:
    """Return steps as parsed from YAML."""
    return Run.model_validate({"scenario": written}).scenario


def training(indexes: Mapping[str, Index]) -> dict[str, Rows]:
    """Return two thirds of the rows of every modality."""
    return {name: np.flatnonzero(np.arange(len(index)) % 3 > 0) for name, index in indexes.items()}


def applied(indexes: Mapping[str, Index], *written: Any, seed: int = 0) -> dict[str, TrainingRows]:
    return apply(steps(*written), indexes, training(indexes), classes=CLASSES, seed=seed)


def counts(labels: Rows) -> list[int]:
    """Count unlabelled rows, then the rows of each class."""
    return np.bincount(labels + 1, minlength=len(CLASSES) + 1).tolist()


def ids(indexes: Mapping[str, Index], selected: Mapping[str, TrainingRows]) -> dict[str, dict[str, int]]:
    """Return the visible label of every sample, per modality."""
    return {
        name: dict(zip(indexes[name].sample_id[index.rows], index.label.tolist(), strict=True))
        for name, index in selected.items()
    }


def half_up(fraction: float, count: int) -> int:
    """Return a fraction that is a multiple of 0.001."""
    return (round(fraction * 1000) * count + 500) // 1000


@pytest.fixture
def paired() -> dict[str, Index]:
    """120 samples in three modalities, four classes of 30, all rows of the same samples for training."""
    rows = [(f"s{number}", f"s{number}", number % 4) for number in range(180)]
    return {name: index_of(rows) for name in ("rna", "protein", "methylation")}


# --- properties of every scenario -------------------------------------------------------------------------------

WRITTEN: Sequence[Any] = (
    {"kind": "hide_labels", "fraction": 0.5},
    {"kind": "hide_labels", "keep": 2},
    {"kind": "cut_class", "label": "c0", "rows": 3},
    {"kind": "keep_pairs", "pairs": [{"label": "c1", "modality": "m0"}], "rows": 1},
    {"kind": "subsample", "fraction": 0.6},
    "unpair",
)


@settings(max_examples=200, deadline=None)
@given(COHORTS, st.lists(st.sampled_from(WRITTEN), max_size=3), SEEDS)
def test_a_scenario_selects_training_rows_only_and_changes_no_class(
    indexes: dict[str, Index], written: list[Any], seed: int
) -> None:
    selected = applied(indexes, *written, seed=seed)
    assert list(selected) == list(indexes)
    for name, index in selected.items():
        stored = indexes[name].label[index.rows]
        assert set(index.rows) <= set(training(indexes)[name]) and (np.diff(index.rows) > 0).all()
        assert ((index.label == stored) | (index.label == -1)).all()


@settings(max_examples=200, deadline=None)
@given(COHORTS, st.lists(st.sampled_from(WRITTEN), min_size=1, max_size=3), SEEDS)
def test_a_scenario_does_not_depend_on_the_order_of_rows_and_modalities(
    indexes: dict[str, Index], written: list[Any], seed: int
) -> None:
    other = reordered(indexes, seed)
    everything = [{name: np.arange(len(index)) for name, index in cohort.items()} for cohort in (indexes, other)]
    chosen = [
        apply(steps(*written), cohort, rows, classes=CLASSES, seed=seed)
        for cohort, rows in zip((indexes, other), everything, strict=True)
    ]
    assert ids(indexes, chosen[0]) == ids(other, chosen[1])


def test_no_steps_keep_everything(paired: dict[str, Index]) -> None:
    selected = applied(paired)
    assert all(counts(index.label) == [0, 30, 30, 30, 30] for index in selected.values())


def test_steps_without_a_seed_use_the_seed_of_the_run(paired: dict[str, Index]) -> None:
    step = {"kind": "subsample", "rows": 5}
    free = [applied(paired, step, seed=seed)["rna"].rows.tolist() for seed in (0, 1)]
    fixed = [applied(paired, step | {"seed": 1}, seed=seed)["rna"].rows.tolist() for seed in (0, 1)]
    assert free[0] != free[1] and fixed == [free[1]] * 2


def test_modalities_choose_their_rows_independently(paired: dict[str, Index]) -> None:
    selected = applied(paired, {"kind": "subsample", "rows": 10})
    assert len({tuple(index.rows) for index in selected.values()}) == 3


# --- hide_labels ------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(COHORTS, st.integers(0, 1000), SEEDS)
def test_the_hidden_fraction_is_exact_in_every_class_and_modality(
    indexes: dict[str, Index], thousandths: int, seed: int
) -> None:
    selected = applied(indexes, {"kind": "hide_labels", "fraction": thousandths / 1000}, seed=seed)
    for name, index in selected.items():
        before = counts(indexes[name].label[index.rows])
        hidden = [half_up(thousandths / 1000, count) for count in before[1:]]
        assert counts(index.label)[1:] == [count - gone for count, gone in zip(before[1:], hidden, strict=True)]


@settings(max_examples=50, deadline=None)
@given(COHORTS, st.tuples(st.integers(0, 100), st.integers(0, 100)), SEEDS)
def test_labels_kept_at_a_lower_level_are_among_those_at_a_higher_one(
    indexes: dict[str, Index], levels: tuple[int, int], seed: int
) -> None:
    few, many = sorted(levels)
    shares = [
        applied(indexes, {"kind": "hide_labels", "fraction": 1 - level / 100}, seed=seed) for level in (few, many)
    ]
    keeps = [applied(indexes, {"kind": "hide_labels", "keep": level // 10}, seed=seed) for level in (few, many)]
    for low, high in (shares, keeps):
        for name in indexes:
            assert ((low[name].label == -1) | (low[name].label == high[name].label)).all()


def test_keep_1_leaves_one_label_per_class_and_modality(paired: dict[str, Index]) -> None:
    selected = applied(paired, {"kind": "hide_labels", "keep": 1})
    assert all(counts(index.label) == [116, 1, 1, 1, 1] for index in selected.values())


def test_fractions_are_decimal_and_half_rows_are_hidden() -> None:
    rows = [(f"s{number}", f"s{number}", 0) for number in range(150)]
    indexes = {"m0": index_of(rows), "m1": index_of(rows)}
    # 100 training rows: 0.145 as a binary number times 100 lies below 14.5.
    assert counts(applied(indexes, {"kind": "hide_labels", "fraction": 0.145})["m0"].label)[0] == 15
    assert counts(
        applied(indexes, {"kind": "hide_labels", "fraction": 0.5}, {"kind": "hide_labels", "fraction": 0.25})[
            "m0"
        ].label
    )[:2] == [63, 37]


def test_labels_are_hidden_in_the_named_classes_and_modalities_only(paired: dict[str, Index]) -> None:
    step = {"kind": "hide_labels", "fraction": 1, "classes": ["c1", "c3"], "modalities": ["rna"]}
    selected = applied(paired, step)
    assert counts(selected["rna"].label) == [60, 30, 0, 30, 0]
    assert counts(selected["protein"].label) == [0, 30, 30, 30, 30]


# --- rows -------------------------------------------------------------------------------------------------------


def test_cut_class_keeps_n_rows_of_the_class_in_every_modality(paired: dict[str, Index]) -> None:
    selected = applied(paired, {"kind": "cut_class", "label": "c2", "rows": 6})
    assert all(counts(index.label) == [0, 30, 30, 6, 30] for index in selected.values())


def test_cut_class_keeps_all_rows_of_a_smaller_class(paired: dict[str, Index]) -> None:
    assert counts(applied(paired, {"kind": "cut_class", "label": "c2", "rows": 99})["rna"].label) == [
        0,
        30,
        30,
        30,
        30,
    ]


@pytest.mark.parametrize(("few", "many"), [(0, 1), (1, 3), (3, 5), (5, 30)])
def test_rows_kept_at_a_lower_level_are_among_those_at_a_higher_one(
    paired: dict[str, Index], few: int, many: int
) -> None:
    pair = [{"label": "c0", "modality": "rna"}]
    for step in ({"kind": "cut_class", "label": "c0"}, {"kind": "keep_pairs", "pairs": pair}):
        low, high = (set(applied(paired, step | {"rows": rows})["rna"].rows) for rows in (few, many))
        assert low < high and len(high) - len(low) == many - few


def test_dropped_pairs_are_removed_and_other_rows_are_unchanged(paired: dict[str, Index]) -> None:
    pairs = [{"label": "c0", "modality": "rna"}, {"label": "c3", "modality": "protein"}]
    selected = applied(paired, {"kind": "drop_pairs", "pairs": pairs})
    assert counts(selected["rna"].label) == [0, 0, 30, 30, 30]
    assert counts(selected["protein"].label) == [0, 30, 30, 30, 0]
    assert counts(selected["methylation"].label) == [0, 30, 30, 30, 30]
    assert absent_pairs(selected, paired, classes=CLASSES) == [("c0", "rna"), ("c3", "protein")]


def test_subsample_keeps_its_fraction_of_unlabelled_rows() -> None:
    rows = [(f"s{number}", f"s{number}", number % 3 - 1) for number in range(90)]
    everything = {"m0": np.arange(90), "m1": np.arange(90)}
    indexes = {"m0": index_of(rows), "m1": index_of(rows)}
    step = steps({"kind": "subsample", "fraction": 0.25, "modalities": ["m0"]})
    selected = apply(step, indexes, everything, classes=CLASSES[:2], seed=0)
    assert counts(selected["m0"].label)[:3] == [8, 8, 8] and counts(selected["m1"].label)[:3] == [30, 30, 30]


def test_hidden_rows_still_belong_to_their_class(paired: dict[str, Index]) -> None:
    hide = {"kind": "hide_labels", "fraction": 1, "classes": ["c0"]}
    selected = applied(paired, hide, {"kind": "cut_class", "label": "c0", "rows": 4})
    assert counts(selected["rna"].label) == [4, 0, 30, 30, 30]
    assert absent_pairs(selected, paired, classes=CLASSES) == []


def test_the_order_of_steps_matters(paired: dict[str, Index]) -> None:
    cut, hide = {"kind": "cut_class", "label": "c0", "rows": 10}, {"kind": "hide_labels", "fraction": 0.5}
    assert counts(applied(paired, cut, hide)["rna"].label)[1] == 5
    assert counts(applied(paired, hide, cut)["rna"].label)[1] != 5


# --- unpair -----------------------------------------------------------------------------------------------------


def by_brute_force(has: Sequence[Sequence[int]], modalities: int) -> int:
    """Return the smallest sum of squared totals over all assignments of samples to their modalities."""
    return min(int((np.bincount(way, minlength=modalities) ** 2).sum()) for way in product(*has))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=1, max_size=8), SEEDS)
def test_unpairing_is_optimally_balanced(has: list[set[int]], seed: int) -> None:
    rows = {f"m{m}": [(f"s{i}", f"s{i}", 0) for i, present in enumerate(has) if m in present] for m in range(3)}
    # A second class with rows in every modality, so that none becomes empty.
    indexes = {name: index_of([*listed, (f"only-{name}", f"only-{name}", 1)]) for name, listed in rows.items()}
    everything = {name: np.arange(len(index)) for name, index in indexes.items()}
    selected = apply(steps("unpair"), indexes, everything, classes=CLASSES, seed=seed)
    totals = [int((listed.label == 0).sum()) for listed in selected.values()]
    assert sum(totals) == len(has)
    assert sum(total**2 for total in totals) == by_brute_force([sorted(present) for present in has], 3)


@settings(max_examples=100, deadline=None)
@given(COHORTS, SEEDS)
def test_every_sample_keeps_exactly_one_modality(indexes: dict[str, Index], seed: int) -> None:
    before, assigned = (
        ids(indexes, applied(indexes, seed=seed)),
        ids(indexes, applied(indexes, "unpair", seed=seed)),
    )
    samples = [sample for samples_of_modality in assigned.values() for sample in samples_of_modality]
    assert sorted(samples) == sorted(set().union(*before.values()))


def test_classes_are_balanced_within_one_row(paired: dict[str, Index]) -> None:
    rows = {name: np.arange(100) for name in paired}
    selected = apply(steps("unpair"), paired, rows, classes=CLASSES, seed=0)
    table = np.array([counts(index.label)[1:] for index in selected.values()])
    assert table.sum(axis=0).tolist() == [25] * 4 and (table.max(axis=0) - table.min(axis=0) == 1).all()
    # The odd row does not always go to the same modality.
    assert len(set(table.argmax(axis=0))) > 1


@pytest.mark.shared
def test_the_published_intersim_scenario_has_its_published_counts(shared: Path) -> None:
    columns = ["sample_id", "label"]
    indexes = {}
    for path in sorted((shared / "data" / "intersim").glob("*.parquet")):
        table = pq.read_table(path, columns=columns).to_pydict()
        codes = [int(label) - 1 for label in table["label"]]
        indexes[path.stem] = index_of(list(zip(table["sample_id"], table["sample_id"], codes, strict=True)))
    everything = {name: np.arange(len(index)) for name, index in indexes.items()}
    classes = [str(number) for number in range(1, 6)]
    unpaired = apply(steps("unpair"), indexes, everything, classes=classes, seed=0)
    table = np.array([np.bincount(part.label) for part in unpaired.values()])
    assert table.sum() == 11_500 and (table.max(axis=0) - table.min(axis=0)).max() <= 1
    # 0.2 % of about 767 rows of a class in a modality is one or two labels.
    few = apply(
        steps("unpair", {"kind": "hide_labels", "fraction": 0.998}), indexes, everything, classes=classes, seed=0
    )
    assert all(set(np.bincount(part.label[part.label >= 0])) <= {1, 2} for part in few.values())


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_all_unknown_names_are_reported_by_key(paired: dict[str, Index]) -> None:
    with pytest.raises(ConfigError) as caught:
        applied(
            paired,
            {"kind": "cut_class", "label": "C2", "rows": 6},
            {
                "kind": "drop_pairs",
                "pairs": [{"label": "c0", "modality": "rna"}, {"label": "x\n", "modality": "protien"}],
            },
            {"kind": "hide_labels", "keep": 1, "classes": ["c1", "c9"], "modalities": ["dna"]},
        )
    assert caught.value.problems == [
        "scenario[0].label: unknown class 'C2'; known: c0, c1, c2, c3",
        "scenario[1].pairs[1].label: unknown class 'x\\\\n'; known: c0, c1, c2, c3",
        "scenario[1].pairs[1].modality: unknown modality 'protien'; did you mean 'protein'?",
        "scenario[2].modalities[0]: unknown modality 'dna'; did you mean 'rna'?",
        "scenario[2].classes[1]: unknown class 'c9'; known: c0, c1, c2, c3",
    ]


def test_a_scenario_that_empties_a_modality_is_refused(paired: dict[str, Index]) -> None:
    pairs = [{"label": label, "modality": "rna"} for label in CLASSES]
    with pytest.raises(ConfigError, match=r"scenario: .*modality rna"):
        applied(paired, {"kind": "drop_pairs", "pairs": pairs})
