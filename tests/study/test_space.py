"""Configurations drawn from a space: distribution, dependencies, refusals."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from modis_dist.config import parse
from modis_dist.config.keys import is_whole
from modis_dist.config.study import Dimension, Pruning, Study
from modis_dist.runtime.errors import ConfigError
from modis_dist.study.manifest import expand
from modis_dist.study.search.space import drawn
from tests.study.toy_study import tree

SPACE = {
    "optim.lr": {"low": 1e-5, "high": 1e-2, "log": True},
    "objective.penalty_weight": {"low": 0, "high": 20},
    "model.latent": {"choices": [4, 8, 16]},
    "optim.batch_size": {"low": 8, "high": 40, "step": 16},
    "optim.epochs": {"low": 2, "high": 40, "log": True},
    "objective.pseudo_label_threshold": {"low": 0.1, "high": 0.9, "step": 0.2},
}


def draws(count: int, *, seed: int = 0, **changes: dict[str, Any]) -> list[dict[str, Any]]:
    space = {key: Dimension.model_validate(dimension) for key, dimension in {**SPACE, **changes}.items()}
    return [drawn(space, seed=seed, number=number) for number in range(count)]


def study(**sweep: Any) -> Study:
    return parse.build(Study, tree(Path("store"), grid={}, **sweep), source="study.yaml")


def listed(configurations: int, *, seed: int = 0, **sweep: Any) -> tuple[Any, ...]:
    search = {"kind": "random", "configurations": configurations, "seed": seed}
    return expand(study(search=search, **{"space": SPACE, **sweep}), "data", source="study.yaml")


def test_a_logarithmic_range_is_drawn_evenly_in_its_logarithm_and_a_plain_one_evenly() -> None:
    drawn = draws(2000)
    exponents = [np.log10(values_of_draw["optim.lr"]) for values_of_draw in drawn]
    assert stats.kstest(exponents, stats.uniform(loc=-5, scale=3).cdf).pvalue > 0.01
    values = [values_of_draw["objective.penalty_weight"] for values_of_draw in drawn]
    assert stats.kstest(values, stats.uniform(scale=20).cdf).pvalue > 0.01


def test_keys_are_drawn_independently_of_each_other() -> None:
    drawn = draws(1000)
    columns = [
        [values_of_draw[key] for values_of_draw in drawn]
        for key in ("optim.lr", "objective.penalty_weight", "optim.epochs")
    ]
    correlation = stats.spearmanr(np.array(columns).T).statistic
    assert np.abs(correlation - np.eye(3)).max() < 0.1


def test_choices_and_steps_are_equally_likely_and_integers_for_integer_keys() -> None:
    drawn = draws(3000)
    for key, values in (
        ("model.latent", [4, 8, 16]),
        ("optim.batch_size", [8, 24, 40]),
        ("objective.pseudo_label_threshold", [0.1, 0.3, 0.5, 0.7, 0.9]),
    ):
        counts = Counter(values_of_draw[key] for values_of_draw in drawn)
        assert sorted(counts) == values, "without the rounding error of a sum of steps"
        assert stats.chisquare(list(counts.values())).pvalue > 0.01
    assert all(
        type(values_of_draw[key]) is int for values_of_draw in drawn for key in ("optim.batch_size", "optim.epochs")
    )
    assert {values_of_draw["optim.epochs"] for values_of_draw in drawn} >= {2, 3, 39, 40}
    assert all(2 <= values_of_draw["optim.epochs"] <= 40 for values_of_draw in drawn)


def test_values_have_three_significant_digits() -> None:
    for values_of_draw in draws(200):
        for key in ("optim.lr", "objective.penalty_weight"):
            assert float(f"{values_of_draw[key]:.3g}") == values_of_draw[key]


def test_a_draw_depends_on_the_seed_its_number_and_its_own_range_only() -> None:
    assert draws(20)[:7] == draws(7)
    assert all(a != b for a, b in zip(draws(20), draws(20, seed=1), strict=True))
    other = draws(7, **{"model.latent": {"choices": [99]}, "objective.beta": {"low": 0, "high": 1}})
    for draw, other_draw in zip(draws(7), other, strict=True):
        assert {k: v for k, v in draw.items() if k != "model.latent"} == {
            k: v for k, v in other_draw.items() if k not in {"model.latent", "objective.beta"}
        }


def test_more_configurations_keep_the_trials_of_the_first_ones() -> None:
    few, many = listed(5), listed(9)
    assert len(few) == 5 * 2 and len(many) == 9 * 2 and many[: len(few)] == few
    assert {trial.configuration for trial in many} == set(range(9))
    assert listed(5, seed=1)[0].id != few[0].id


def test_every_condition_tries_the_same_configurations() -> None:
    conditions = {"few": {"objective.beta": 1e-3}, "many": {"objective.beta": 1e-2}}
    drawn = listed(4, conditions=conditions)
    params = {name: [t.params for t in drawn if t.condition == name] for name in conditions}
    assert params["few"] == params["many"] and len(params["few"]) == 8


def test_the_first_round_of_optuna_is_that_of_a_random_search() -> None:
    search = {"kind": "optuna", "configurations": 30, "round_size": 5}
    assert expand(study(search=search, space=SPACE), "data", source="s") == listed(5)


def test_configurations_drawn_twice_are_trained_once() -> None:
    assert len(listed(50, space={"model.latent": {"choices": [4, 8]}})) == 2 * 2


@pytest.mark.parametrize(
    ("key", "whole"),
    [
        ("model.latent", True),
        ("trainer.early_stopping.patience", True),
        ("model.modalities.cnv.features", True),
        ("optim.lr", False),
        ("optim.lr_schedule", False),
        ("model.discriminator", False),
        ("nothing.such", False),
    ],
)
def test_integer_keys_are_recognised_by_their_type(key: str, whole: bool) -> None:
    assert is_whole(key) == whole


LR = {"optim.lr": {"choices": [1e-3]}}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"search": "random"}, "sweep: search and space "),
        ({"space": LR}, "sweep: search and space "),
        ({"search": "random", "space": LR, "grid": {"seed": [1]}}, "sweep: set grid or search"),
        ({"search": "rondom", "space": LR}, "unknown kind 'rondom'; did you mean 'random'?"),
        ({"search": {"kind": "random", "round_size": 3}, "space": LR}, "sweep.search.round_size: unknown key"),
        ({"search": "random", "space": {"optim.lr": {"low": 1}}}, "sweep.space.optim.lr: set low and high"),
        ({"search": "random", "space": {"optim.lr": {"low": 2, "high": 1}}}, "low must be below high (1); got 2"),
        ({"search": "random", "space": {"optim.lr": {"low": 0, "high": 1, "log": True}}}, "low must be > 0; got 0"),
        ({"search": "random", "space": {"optim.lr": {"low": 1, "high": 2, "log": True, "step": 1}}}, "log or step"),
        ({"search": "random", "space": {"optim.lr": {"choices": [1], "low": 1}}}, "sweep.space.optim.lr: choices "),
        ({"search": "random", "space": {"optim.lr": {"low": 1, "hihg": 2}}}, "unknown key; did you mean 'high'"),
        ({"search": "random", "space": {"optim.lrr": {"choices": [1]}}}, "optim.lrr: unknown key; did you mean 'lr'"),
        ({"search": "random", "space": {"optim.lr": {"low": -1, "high": 1}}}, "optim.lr: must be > 0 (got -1"),
        ({"search": "random", "space": {"model.latent": {"low": 1.5, "high": 3}}}, "model.latent: must be an integer"),
        (
            {"search": "random", "space": {"model.latent": {"low": 1, "high": 9, "step": 1.5}}},
            "sweep.space: model.latent: step ",
        ),
        ({"search": "random", "space": {"seed": {"low": 1, "high": 9}}}, "seed: cannot be swept"),
        (
            {"search": "random", "space": LR, "conditions": {"a": {"optim.lr": 1}}},
            "optim.lr is set by both the space and a condition",
        ),
        ({"pruning": {"min_epochs": 4}}, "sweep.pruning.min_epochs: must be < optim.epochs (4)"),
        ({"pruning": {"factor": 1}}, "sweep.pruning.factor: must be >= 2 (got 1)"),
    ],
)
def test_an_invalid_search_is_refused_before_anything_starts(
    tmp_path: Path, sweep: dict[str, Any], message: str
) -> None:
    from modis_dist.config import yaml12

    file = tmp_path / "study.yaml"
    file.write_text(yaml12.dump(tree(Path("store"), **{"grid": {}, **sweep})))
    with pytest.raises(ConfigError) as refused:
        expand(parse.load_study(file), "data", source="study.yaml")
    assert message in str(refused.value)


def test_a_rung_before_the_first_validation_is_refused() -> None:
    values = tree(Path("store"), pruning={"min_epochs": 2})
    values["trainer"]["validate_every"] = 3
    with pytest.raises(ConfigError, match=r"trainer\.validate_every \(3\)"):
        expand(parse.build(Study, values, source="s"), "data", source="s")


def test_a_space_is_set_on_the_command_line_like_a_grid() -> None:
    values = tree(Path("store"), grid={}, search="random", space={})
    changed = parse.with_overrides(values, ["sweep.space.optim.lr={low: 1e-4, high: 1e-2, log: true}"])
    assert parse.build(Study, changed, source="s").sweep.space["optim.lr"].high == 1e-2


@pytest.mark.parametrize(
    ("first", "factor", "epochs", "rungs"), [(20, 3, 300, [20, 60, 180]), (1, 2, 8, [1, 2, 4]), (5, 4, 5, [])]
)
def test_rungs_grow_by_the_factor_and_stay_below_the_last_epoch(
    first: int, factor: int, epochs: int, rungs: list[int]
) -> None:
    assert Pruning(min_epochs=first, factor=factor).rungs(epochs=epochs) == rungs
