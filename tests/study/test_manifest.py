"""From a study to trials, packs and groups."""

from pathlib import Path

import numpy as np
import pytest

from modis_dist.config import parse
from modis_dist.config.study import Packing, Study
from modis_dist.execution.trial import trial_id
from modis_dist.metrics import ClassPredictions, classification
from modis_dist.runtime.errors import ConfigError, DataError
from modis_dist.study import manifest
from modis_dist.study.aggregate import grouped, spread
from modis_dist.study.manifest import Manifest, expand, refit
from modis_dist.study.packs import arrange_packs, group_into_packs, pack_size_limit, stack_key
from modis_dist.study.selection import chosen, mark
from tests.study.toy_study import tree
from tests.train import toy

STORE = Path("store")


def study(**sweep: object) -> Study:
    return parse.build(Study, tree(STORE, **sweep), source="study.yaml")


def trials(**sweep: object):
    return expand(study(**sweep), "data", source="study.yaml")


def test_a_sweep_is_conditions_times_grid_times_folds_times_replicates() -> None:
    conditions = {"few": {"objective.penalty_weight": 1.0}, "many": {"objective.penalty_weight": 2.0}}
    grid = {"objective.beta": [1e-4, 1e-3, 1e-2], "optim.lr": [1e-4, 1e-3]}
    drawn = trials(conditions=conditions, grid=grid, folds=5, replicates=3)
    assert len(drawn) == 2 * 6 * 5 * 3 == len({t.id for t in drawn})
    last = drawn[-1]
    assert last.condition == "many" and last.params == {"objective.beta": 1e-2, "optim.lr": 1e-3}
    assert (last.run.data.split.fold, last.run.seed, last.run.objective.penalty_weight) == (4, 2, 2.0)


def test_a_trial_keeps_its_id_when_no_setting_that_decides_its_result_changes() -> None:
    run = trials()[0].run
    same = run.model_copy(
        update={
            "name": "other",
            "data": run.data.model_copy(update={"store": "/elsewhere"}),
            "trainer": run.trainer.model_copy(
                update={"threads": 3, "feature_storage": "disk", "log_every": 1, "checkpoint_every": 99}
            ),
        }
    )
    assert trial_id(same, "data") == trial_id(run, "data")
    assert trial_id(same, "other data") != trial_id(run, "data")
    for override in ("seed=5", "optim.lr=0.5", "trainer.validate_every=2", "data.split.seed=1", "scenario=[unpair]"):
        changed = parse.build(type(run), parse.with_overrides(parse.to_tree(run), [override]), source="x")
        assert trial_id(changed, "data") != trial_id(run, "data"), override


def test_equal_grid_points_are_trained_once() -> None:
    assert len(trials(grid={"objective.beta": [0.5, 0.50, 5e-1]}, folds=2)) == 2


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"grid": {"optim.lrr": [1]}}, "optim.lrr: unknown key; did you mean 'lr'"),
        ({"grid": {"optim.lr": [1, -1]}}, "optim.lr: "),
        ({"grid": {"data.store": ["a"]}}, "data.store: cannot be swept"),
        ({"grid": {"trainer.metric": ["nmi"]}}, "trainer.metric: cannot be swept"),
        ({"grid": {"data.classes": [["a", "b"]]}}, "data.classes: cannot be swept"),
        ({"conditions": {"a": {"trainer.metric": "nmi"}}}, "trainer.metric: cannot be swept"),
        ({"grid": {"seed": [1]}}, "seed: cannot be swept"),
        ({"grid": {"data.split.seed": [1]}}, "data.split.seed: cannot be swept"),
        ({"conditions": {"a": {"name": "b"}}}, "name: cannot be swept"),
        ({"grid": {"optim.lr": [1]}, "conditions": {"a": {"optim.lr": 1}}}, "set by both"),
        ({"grid": {"seed.x": list(range(400)), "optim.lr": list(range(1, 400))}}, "sweep: 319200 trials"),
    ],
)
def test_an_invalid_sweep_is_refused_before_anything_starts(sweep: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        trials(**sweep)


def test_a_sweep_without_validation_rows_is_refused() -> None:
    values = tree(STORE, folds=1)
    values["data"]["split"]["validation_fraction"] = 0
    with pytest.raises(ConfigError, match=r"data\.split\.validation_fraction: .*sweep\.folds"):
        expand(parse.build(Study, values, source="s"), "data", source="s")


def test_the_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    drawn = trials()
    listed = Manifest("toy", "data", drawn, (tuple(t.id for t in drawn[:2]), tuple(t.id for t in drawn[2:])))
    manifest.save(tmp_path / "manifest.json", listed)
    assert manifest.load(tmp_path / "manifest.json") == listed


def test_a_manifest_of_another_format_version_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "manifest.json"
    file.write_text('{"version": 1, "study": "x", "fingerprint": "x", "trials": [], "packs": [], "refit_packs": []}')
    with pytest.raises(DataError, match=r"manifest\.json: .*\b1\b"):
        manifest.load(file)


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json"):
        manifest.load(tmp_path / "manifest.json")


def test_a_refit_uses_all_training_rows_and_a_fixed_number_of_epochs() -> None:
    again = refit(trials()[0], "data", epochs=3)
    split = again.run.data.split
    assert (split.folds, split.fold, split.validation_fraction) == (None, None, 0)
    assert again.run.optim.epochs == 3 and again.run.trainer.early_stopping is None


# --- packs --------------------------------------------------------------------------------------------------


def test_trials_that_differ_in_seed_fold_scenario_and_weights_share_a_stack() -> None:
    grid = {
        "objective.beta": [1e-4, 1e-3],
        "objective.adversarial_loss": ["pairwise", "published"],
        "scenario": [[], [{"kind": "hide_labels", "fraction": 0.5}]],
    }
    selection = toy.cohort().selection
    assert len({stack_key(t, lambda _: selection) for t in trials(grid=grid, replicates=2, folds=3)}) == 1


@pytest.mark.parametrize("key", ["optim.lr", "model.latent", "optim.batch_size", "optim.epochs"])
def test_trials_that_differ_in_settings_shared_by_a_stack_are_in_different_packs(key: str) -> None:
    selection = toy.cohort().selection
    drawn = trials(grid={key: [1, 2] if key != "optim.batch_size" else [8, 4]}, folds=2)
    assert len({stack_key(t, lambda _: selection) for t in drawn}) == 2


@pytest.mark.parametrize(("precision", "stacks"), [("fp32", 1), ("bf16", 2)])
def test_in_lower_precision_trials_with_and_without_a_penalty_are_not_stacked(precision: str, stacks: int) -> None:
    selection = toy.cohort().selection
    drawn = trials(grid={"objective.penalty_weight": [0.0, 1.0, 2.0], "trainer.precision": [precision]})
    assert len({stack_key(t, lambda _: selection) for t in drawn}) == stacks


def test_packs_hold_every_trial_once_and_fill_every_slot() -> None:
    selection = toy.cohort().selection
    drawn = trials(grid={"objective.beta": list(np.linspace(0, 1, 13))}, folds=1)
    for slots in (1, 2, 5, 20):
        packs = group_into_packs(drawn, lambda _: selection, max_pack_size=lambda _: 8, slots=slots)
        assert sorted(t.id for pack in packs for t in pack) == sorted(t.id for t in drawn)
        assert len(packs) >= min(slots, 13) and max(map(len, packs)) <= 8
        assert max(map(len, packs)) - min(map(len, packs)) <= 1


@pytest.mark.parametrize(
    ("groups", "slots", "sizes"),
    [
        ([40], 4, [[5] * 8]),  # five packs of eight would take two rounds as well, longer ones
        ([10, 3], 8, [[2, 2, 2, 2, 1, 1], [2, 1]]),
        ([10, 3], 1, [[5, 5], [3]]),
        ([16], 2, [[8, 8]]),
        ([2, 1], 5, [[1, 1], [1]]),
    ],
)
def test_no_slot_idles_in_the_last_round(groups: list[int], slots: int, sizes: list[list[int]]) -> None:
    selection, drawn = toy.cohort().selection, []
    for latent, count in enumerate(groups, 2):
        drawn += trials(grid={"objective.beta": list(np.linspace(0, 1, count)), "model.latent": [latent]}, folds=1)
    packs = group_into_packs(drawn, lambda _: selection, max_pack_size=lambda _: 8, slots=slots)
    by_group: dict[int, list[int]] = {}
    for pack in packs:
        by_group.setdefault(pack[0].run.model.latent, []).append(len(pack))
    assert list(by_group.values()) == sizes


def test_packs_of_an_earlier_start_stay_and_only_trials_not_done_get_new_packs() -> None:
    selection = toy.cohort().selection
    drawn = trials(grid={"objective.beta": [0.1, 0.2, 0.3, 0.4, 0.5]}, folds=1)
    ids = [t.id for t in drawn]
    earlier = [(ids[0], ids[1]), (ids[2], "gone")]
    packs = arrange_packs(
        drawn,
        lambda _: selection,
        earlier=earlier,
        done=lambda t: t.id == ids[2],
        max_pack_size=lambda _: 8,
        slots=1,
    )
    assert [[t.id for t in pack] for pack in packs] == [[ids[0], ids[1]], [ids[3], ids[4]]]


@pytest.mark.parametrize(
    ("packing", "each", "on_processor", "on_gpu"),
    [
        (Packing(), 8 * 2**20, 8, 32),  # InterSIM
        (Packing(), 320_000_000, 4, 4),  # TCGA-10
        (Packing(), 4_000_000_000, 1, 1),
        (Packing(max_trials=20), 320 * 2**20, 20, 20),
        (Packing(enabled=False), 1000, 1, 1),
        (Packing(enabled=False, max_trials=20), 1000, 1, 1),
    ],
)
def test_packs_of_large_networks_are_smaller_unless_max_trials_is_set(
    packing: Packing, each: int, on_processor: int, on_gpu: int
) -> None:
    assert [pack_size_limit(packing, each, on_gpu=where) for where in (False, True)] == [on_processor, on_gpu]


# --- groups -------------------------------------------------------------------------------------------------


def result(value: float | None, *, status: str = "done") -> dict:
    return {
        "status": status,
        "value": value,
        "best_epoch": 3,
        "baseline": classification({"m": ClassPredictions(np.array([0, 1]), np.array([0, 0]))}, classes=("a", "b")),
        "evaluation": {
            "probe": {"knn": 0.4},
            "classification": classification(
                {"m": ClassPredictions(np.array([0, 1]), np.array([0, 1]))}, classes=("a", "b")
            ),
        },
        "reason": "x",
    }


def test_groups_are_means_and_sample_standard_deviations_over_folds_and_replicates() -> None:
    drawn = trials(folds=3, replicates=2)
    values = np.linspace(0.1, 0.9, len(drawn))
    groups = grouped(drawn, {t.id: result(v) for t, v in zip(drawn, values, strict=True)}, {})
    assert [g["mean"] for g in groups] == pytest.approx([values[:6].mean(), values[6:].mean()])
    assert groups[0]["sd"] == pytest.approx(values[:6].std(ddof=1)) and groups[0]["baseline"] == 0.5
    assert chosen(mark(groups, metric="balanced_accuracy"))["all"]["params"] == groups[1]["params"]
    assert chosen(mark(groups, metric="reconstruction_mse"))["all"]["params"] == groups[0]["params"]


def test_a_group_with_a_missing_fold_is_shown_and_not_chosen() -> None:
    drawn = trials(folds=2)
    results = {drawn[0].id: result(0.5), drawn[1].id: result(0.5), drawn[2].id: result(0.9)}
    results[drawn[3].id] = result(None, status="failed")
    groups = grouped(drawn, results, {drawn[3].id: "step 7: kl/cnv is nan"})
    assert (groups[1]["n"], groups[1]["expected"], groups[1]["failed"]) == (1, 2, 1)
    assert groups[1]["reasons"] == ["step 7: kl/cnv is nan"]
    assert chosen(mark(groups, metric="balanced_accuracy"))["all"]["params"] == groups[0]["params"]


def test_the_first_of_equal_groups_is_chosen() -> None:
    drawn = trials(folds=1)
    groups = grouped(drawn, {t.id: result(0.5) for t in drawn}, {})
    marked = mark(groups, metric="nmi")
    assert chosen(marked) == {"all": marked[0]}


def test_the_spread_of_one_value_has_no_standard_deviation() -> None:
    assert spread([0.5, None]) == {"mean": 0.5, "sd": None, "n": 1}
    assert spread([]) == {"mean": None, "sd": None, "n": 0}
