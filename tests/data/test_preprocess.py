"""Preprocessing equals scikit-learn, is stored exactly, and errors name modality and features."""

import json
import tracemalloc
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from modis_dist.config.run import Preprocess
from modis_dist.data import preprocess
from modis_dist.data.preprocess import Pipeline, fit
from modis_dist.data.store import arrays
from modis_dist.data.store.index import Features
from modis_dist.runtime.errors import DataError

SEEDS = st.integers(0, 2**32)
STEPS: tuple[Any, ...] = (
    "standardise",
    "minmax",
    {"kind": "impute", "strategy": "median"},
    {"kind": "variance_filter", "features": 4},
    {"kind": "pca", "components": 3},
)


def steps(*written: Any) -> Any:
    """Return steps as parsed from YAML."""
    return Preprocess.model_validate({"default": written}).default


def fitted(x: Features, *written: Any, modality: str = "rna") -> Pipeline:
    return fit(steps(*written), x, features=[f"f{number}" for number in range(x.shape[1])], modality=modality)


def random_rows(seed: int, rows: int = 60, features: int = 12) -> Features:
    """Positive values of very different size per feature."""
    rng = np.random.default_rng(seed)
    return (rng.lognormal(size=(rows, features)) * 10.0 ** rng.integers(-3, 4, features)).astype(np.float32)


@pytest.fixture(params=[1 << 22, 40], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run a test with data in one block and in many blocks."""
    monkeypatch.setattr(arrays, "VALUES_PER_BLOCK", request.param)
    monkeypatch.setattr(preprocess, "VALUES_FOR_MEDIANS", request.param)
    monkeypatch.setattr(preprocess, "VALUES_FOR_RANDOMIZED_PCA", request.param)
    yield


def close(got: Features, expected: Any) -> bool:
    assert got.dtype == np.float32
    return bool(np.allclose(got, expected, rtol=1e-5, atol=1e-5))


# --- equality with scikit-learn ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("blocks")
def test_standardise_equals_scikit_learn() -> None:
    x, other = random_rows(0), random_rows(1)
    scaler = StandardScaler().fit(x.astype(np.float64))
    pipeline = fitted(x, "standardise")
    assert close(pipeline.apply(x), scaler.transform(x)) and close(pipeline.apply(other), scaler.transform(other))


@pytest.mark.usefixtures("blocks")
def test_minmax_equals_scikit_learn_and_training_rows_are_between_0_and_1() -> None:
    x, other = random_rows(0), random_rows(1)
    scaler = MinMaxScaler().fit(x.astype(np.float64))
    pipeline = fitted(x, "minmax")
    assert close(pipeline.apply(x), scaler.transform(x)) and close(pipeline.apply(other), scaler.transform(other))
    assert (pipeline.apply(x).min(axis=0) == 0).all() and (pipeline.apply(x).max(axis=0) == 1).all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("value", ["mean", "median"])
def test_impute_equals_scikit_learn(value: str) -> None:
    x = random_rows(0)
    x[np.random.default_rng(2).random(x.shape) < 0.3] = np.nan
    expected = SimpleImputer(strategy=value).fit_transform(x.astype(np.float64))
    assert close(fitted(x, {"kind": "impute", "strategy": value}).apply(x), expected)


@pytest.mark.usefixtures("blocks")
def test_missing_values_are_ignored_by_mean_and_scale() -> None:
    x = random_rows(0)
    x[np.random.default_rng(2).random(x.shape) < 0.3] = np.nan
    scaled = StandardScaler().fit_transform(x.astype(np.float64))
    assert close(fitted(x, "standardise", "impute").apply(x), np.nan_to_num(scaled))


@pytest.mark.usefixtures("blocks")
def test_log1p_equals_its_definition() -> None:
    x = random_rows(0)
    assert close(fitted(x, "log1p").apply(x), np.log(1 + x.astype(np.float64)))


@pytest.mark.usefixtures("blocks")
def test_variance_filter_keeps_the_most_variable_features_in_order() -> None:
    x = random_rows(0)
    best = np.sort(np.argsort(x.astype(np.float64).var(axis=0))[-5:])
    pipeline = fitted(x, {"kind": "variance_filter", "features": 5})
    assert pipeline.features_out == tuple(f"f{number}" for number in best)
    assert (pipeline.apply(x) == x[:, best]).all()


def test_ties_in_variance_keep_the_first_features() -> None:
    x = np.tile(random_rows(0, features=2), (1, 50))
    first = int(np.argmax(x.var(axis=0)))
    remaining = tuple(f"f{first + 2 * number}" for number in range(5))
    assert fitted(x, {"kind": "variance_filter", "features": 5}).features_out == remaining


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("solver", ["auto", "randomized", "incremental"])
def test_pca_equals_scikit_learn_up_to_sign(solver: str) -> None:
    # Clear gaps between components, so that the approximate solvers have a unique solution.
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(200, 4)) * [100, 30, 10, 3]
    x = (scores @ rng.normal(size=(4, 15)) + rng.normal(size=15)).astype(np.float32)
    model = PCA(3).fit(x.astype(np.float64))
    got = fitted(x, {"kind": "pca", "components": 3, "solver": solver})
    expected = model.transform(x.astype(np.float64))
    aligned = got.apply(x) * np.sign((got.apply(x) * expected).sum(axis=0))
    assert np.abs(aligned - expected).max() < 0.01 * np.abs(expected).max()
    assert got.features_out == ("pc1", "pc2", "pc3")


def test_auto_pca_is_incremental_above_a_size_and_finds_the_same_components(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_rows(3, rows=90, features=8)
    full = fitted(x, "standardise", {"kind": "pca", "components": 8})
    monkeypatch.setattr(preprocess, "VALUES_FOR_FULL_PCA", 100)
    monkeypatch.setattr(arrays, "VALUES_PER_BLOCK", 200)
    monkeypatch.setattr(preprocess, "_in_memory_pca", None)
    # With all components kept, nothing is lost between batches.
    assert np.allclose(fitted(x, "standardise", {"kind": "pca", "components": 8}).apply(x), full.apply(x), atol=1e-4)


@pytest.mark.parametrize("solver", ["auto", "randomized", "incremental"])
def test_the_largest_loading_of_every_component_is_positive(solver: str) -> None:
    x = random_rows(4)
    for data in (x, -x):
        pipeline = fitted(data, "standardise", {"kind": "pca", "components": 6, "solver": solver})
        components = pipeline.steps[-1].arrays["components"]
        assert (components[np.arange(6), np.abs(components).argmax(axis=1)] > 0).all()


# --- inverse ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    "written", [("standardise",), ("minmax",), ("log1p",), ("log1p", "standardise", {"kind": "pca", "components": 12})]
)
def test_inverse_restores_the_data(written: Any) -> None:
    x = random_rows(0)
    pipeline = fitted(x, *written)
    back = pipeline.inverse(pipeline.apply(x))
    assert back.dtype == np.float32 and np.allclose(back, x, rtol=1e-4, atol=1e-5 * x.max(axis=0))


def test_inverse_of_pca_is_the_projection_on_its_components() -> None:
    x = random_rows(0)
    model = PCA(3).fit(x.astype(np.float64))
    pipeline = fitted(x, {"kind": "pca", "components": 3})
    expected = model.inverse_transform(model.transform(x.astype(np.float64)))
    assert np.allclose(pipeline.inverse(pipeline.apply(x)), expected, rtol=1e-4, atol=1e-5 * x.max())


def test_dropped_features_are_restored_as_their_training_mean() -> None:
    x = random_rows(0)
    pipeline = fitted(x, {"kind": "variance_filter", "features": 5}, "standardise")
    remaining = [int(name[1:]) for name in pipeline.features_out]
    dropped = np.setdiff1d(np.arange(12), remaining)
    back = pipeline.inverse(pipeline.apply(x))
    assert np.allclose(back[:, remaining], x[:, remaining], rtol=1e-4)
    assert np.allclose(back[:, dropped], x[:, dropped].mean(axis=0, dtype=np.float64), rtol=1e-6)


def test_imputed_values_stay_when_the_rest_is_inverted() -> None:
    x = np.array([[1, 5], [np.nan, 6], [3, 10]], dtype=np.float32)
    pipeline = fitted(x, "impute", "standardise")
    assert np.allclose(pipeline.inverse(pipeline.apply(x)), [[1, 5], [2, 6], [3, 10]])


def test_inverse_beyond_float32_is_infinite_without_a_warning() -> None:
    assert np.isinf(fitted(random_rows(0), "log1p").inverse(np.full((1, 12), 1000, dtype=np.float32))).all()


# --- storage ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.lists(st.sampled_from(STEPS), max_size=4, unique_by=str))
def test_a_stored_pipeline_is_bit_identical(seed: int, written: list[Any]) -> None:
    x = random_rows(seed)
    try:
        pipeline = fitted(x, *written)
    except DataError as error:
        assert "variance_filter: features is 4" in str(error)
        return
    arrays, description = pipeline.to_arrays()
    restored = Pipeline.from_arrays(
        {name: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape) for name, array in arrays.items()},
        json.loads(json.dumps(description)),
    )
    y = pipeline.apply(x)
    assert restored.features_out == pipeline.features_out and restored.modality == "rna"
    assert (restored.apply(x) == y).all() and (restored.inverse(y) == pipeline.inverse(y)).all()


def test_steps_past_the_tenth_keep_their_own_arrays() -> None:
    x = random_rows(0)
    pipeline = fitted(x, *["standardise", "minmax"] * 6)
    restored = Pipeline.from_arrays(*pipeline.to_arrays())
    assert (restored.apply(x) == pipeline.apply(x)).all()


def test_a_step_of_a_later_version_is_refused() -> None:
    description = {"modality": "rna", "features_in": ["a"], "steps": ["quantiles"]}
    with pytest.raises(DataError, match="quantiles"):
        Pipeline.from_arrays({}, description)


# --- training rows only -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.permutations(STEPS))
def test_rows_outside_the_fit_do_not_influence_it(seed: int, written: list[Any]) -> None:
    ordered = [step for step in written if "pca" not in str(step)] + [STEPS[-1]]
    train, test = random_rows(seed, rows=40), random_rows(seed + 1, rows=20) * 1e6
    pipeline = fitted(train, *ordered)
    expected = pipeline.apply(train)
    assert np.allclose(pipeline.apply(np.concatenate([train, test]))[:40], expected, rtol=1e-6, atol=1e-6)
    assert (fitted(train, *ordered).apply(train) == expected).all()


@pytest.mark.usefixtures("blocks")
def test_the_input_is_not_modified() -> None:
    x = random_rows(0)
    before = x.copy()
    fitted(x, "impute", "log1p", "standardise").apply(x)
    assert (x == before).all()


@pytest.mark.parametrize("value", ["mean", "median"])
def test_fitting_and_applying_need_little_more_memory_than_the_result(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = random_rows(0, rows=20_000, features=100)
    monkeypatch.setattr(arrays, "VALUES_PER_BLOCK", 50_000)
    monkeypatch.setattr(preprocess, "VALUES_FOR_MEDIANS", 50_000)
    fitted(x[:100], "impute").apply(x[:100])
    tracemalloc.start()
    try:
        pipeline = fitted(
            x, {"kind": "impute", "strategy": value}, "standardise", {"kind": "variance_filter", "features": 50}
        )
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 2
        out = pipeline.apply(x)
        assert tracemalloc.get_traced_memory()[1] < out.nbytes + x.nbytes / 2
    finally:
        tracemalloc.stop()


def test_components_of_large_data_need_little_memory_and_are_correct(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = random_rows(0, rows=5_000, features=400)
    step = {"kind": "pca", "components": 2, "solver": "randomized"}
    at_once = fitted(x, "standardise", step).steps[-1].arrays
    monkeypatch.setattr(arrays, "VALUES_PER_BLOCK", 50_000)
    monkeypatch.setattr(preprocess, "VALUES_FOR_RANDOMIZED_PCA", 100_000)
    tracemalloc.start()
    try:
        in_blocks = fitted(x, "standardise", step).steps[-1].arrays
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 2
    finally:
        tracemalloc.stop()
    for name, values in at_once.items():
        assert np.allclose(in_blocks[name], values, rtol=0, atol=1e-9)


def test_checks_do_not_hold_the_counts_of_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_rows(0, rows=200, features=5_000)
    monkeypatch.setattr(arrays, "VALUES_PER_BLOCK", 5_000)
    fitted(x[:2], "log1p")
    tracemalloc.start()
    try:
        fitted(x, "log1p")
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 4
    finally:
        tracemalloc.stop()


# --- edge cases -------------------------------------------------------------------------------------------------


def test_a_constant_feature_becomes_0_and_is_restored() -> None:
    # The logarithm is not exact in float64, and the mean of 1,001 equal values may differ from the value.
    x = np.column_stack([np.full(1001, 0.1), np.arange(1001)]).astype(np.float32)
    for step in ("standardise", "minmax"):
        pipeline = fitted(x, "log1p", step)
        y = pipeline.apply(x)
        assert (y[:, 0] == 0).all() and np.isfinite(y).all()
        assert (pipeline.inverse(y)[:, 0] == x[:, 0]).all()


def test_a_constant_training_feature_is_0_under_minmax_for_all_rows() -> None:
    pipeline = fitted(np.ones((5, 1), dtype=np.float32), "minmax")
    assert pipeline.apply(np.array([[7.0]], dtype=np.float32)).tolist() == [[0.0]]


@pytest.mark.parametrize("step", ["standardise", "minmax", "log1p", "impute"])
def test_one_training_row_is_enough(step: str) -> None:
    assert np.isfinite(fitted(random_rows(0, rows=1), step).apply(random_rows(1, rows=3))).all()


def test_no_rows_and_no_steps_are_allowed() -> None:
    x = random_rows(0)
    assert fitted(x, *STEPS[:4]).apply(x[:0]).shape == (0, 4)
    assert (fitted(x).apply(x) == x).all() and fitted(x).features_out == fitted(x).features_in


def test_values_near_the_limit_of_float32_are_scaled_without_a_warning() -> None:
    x = np.array([[3e38], [-3e38], [1e-44]], dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(fitted(x, "standardise").apply(x).ravel(), [1.5**0.5, -(1.5**0.5), 0], atol=1e-6)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("blocks")
def test_missing_values_at_the_end_are_refused_with_the_first_five_features() -> None:
    x = random_rows(0)
    x[[3, 59], 2:9] = np.nan
    message = r"modality rna: .*\b7 .*\(f2, f3, f4, f5, f6, \.\.\.\); .*impute"
    for written in (["standardise"], [{"kind": "pca", "components": 2}], []):
        with pytest.raises(DataError, match=message):
            fitted(x, *written).apply(x)


def test_missing_values_in_new_rows_are_named_by_the_features_before_pca() -> None:
    x = random_rows(0)
    new = x[:4].copy()
    new[2, 5] = np.nan
    with pytest.raises(DataError, match=r"modality rna: .*\b1 .*\(f5\)"):
        fitted(x, "standardise", {"kind": "pca", "components": 2}, "standardise").apply(new)


def test_a_feature_without_any_value_cannot_be_imputed() -> None:
    x = random_rows(0)
    x[:, 4] = np.nan
    for value in ("mean", "median"):
        with pytest.raises(DataError, match=r"modality rna: impute: .*\b1 .*\(f4\)"):
            fitted(x, {"kind": "impute", "strategy": value})
    assert "f4" not in fitted(x, {"kind": "variance_filter", "features": 11}, "impute").features_out


@pytest.mark.usefixtures("blocks")
def test_log1p_refuses_negative_values_by_feature_and_number_of_rows() -> None:
    x = random_rows(0)
    x[[1, 30, 50], 6] = -0.5
    x[2, 8] = -3
    message = r"modality rna: log1p: .*\b2 .*\(f6, f8\).*\bf6: 3 "
    with pytest.raises(DataError, match=message):
        fitted(x, "log1p")
    with pytest.raises(DataError, match=message):
        fitted(random_rows(0), "log1p").apply(x)


@pytest.mark.usefixtures("blocks")
def test_infinite_values_are_refused() -> None:
    x = random_rows(0)
    x[5, 3] = -np.inf
    for written in (["standardise"], []):
        with pytest.raises(DataError, match=r"modality rna: .*infinite.*\b1 .*\(f3\)"):
            fitted(x, *written).apply(x)


def test_results_beyond_float32_are_refused() -> None:
    pipeline = fitted(np.array([[0], [1e-38]], dtype=np.float32), "minmax")
    with pytest.raises(DataError, match=r"modality rna: .*float32"):
        pipeline.apply(np.array([[1e30]], dtype=np.float32))


def test_more_components_than_rows_or_features_are_refused_with_the_limit() -> None:
    for rows, features, limit in ((60, 12, 12), (5, 12, 5)):
        message = f"modality rna: pca: .*13.*\\b{rows} .*\\b{features} .*\\b{limit}\\b"
        with pytest.raises(DataError, match=message):
            fitted(random_rows(0, rows, features), {"kind": "pca", "components": 13})


def test_a_filter_for_more_features_than_there_are_is_refused() -> None:
    with pytest.raises(DataError, match=r"modality rna: variance_filter: .*13.*12"):
        fitted(random_rows(0), {"kind": "variance_filter", "features": 13})
