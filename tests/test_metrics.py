"""Metrics equal scikit-learn, brute force and hand-computed cases."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sklearn import metrics as sk

from modis_dist import metrics
from modis_dist.metrics import ClassPredictions, all_pairs_mse, classification, headline, translation

CLASSES = ("a", "b", "c", "d")
code = st.integers(0, 3)
pairs_of_codes = st.lists(st.tuples(code, code), min_size=1, max_size=60)


def codes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, np.int64)
    return table[:, 0], table[:, 1]


@given(pairs_of_codes)
@example([(0, 0)])
@example([(1, 1), (1, 1)])
@example([(0, 1), (0, 2)])
@example([(0, 3), (1, 3)])
@example([(0, 1), (1, 0)])
def test_pooled_metrics_equal_scikit_learn(pairs):
    true, predicted = columns(pairs)
    metrics = classification({"m": ClassPredictions(true, predicted)}, classes=CLASSES)
    recalls = [np.mean(predicted[true == k] == k) for k in np.unique(true)]
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert metrics["macro_f1"] == pytest.approx(sk.f1_score(true, predicted, average="macro", zero_division=0))
    assert metrics["nmi"] == pytest.approx(sk.normalized_mutual_info_score(true, predicted), abs=1e-12)
    assert metrics["ari"] == pytest.approx(sk.adjusted_rand_score(true, predicted), abs=1e-12)
    assert metrics["confusion"] == sk.confusion_matrix(true, predicted, labels=range(4)).tolist()


def test_balanced_accuracy_equals_scikit_learn():
    draw = np.random.default_rng(0)
    true, predicted = draw.integers(0, 4, 500), draw.integers(0, 4, 500)
    metrics = classification({"m": ClassPredictions(true, predicted)}, classes=CLASSES)
    assert metrics["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(true, predicted))


@given(pairs_of_codes)
def test_recall_and_precision_per_class_equal_scikit_learn_and_are_none_if_undefined(pairs):
    true, predicted = columns(pairs)
    metrics = classification({"m": ClassPredictions(true, predicted)}, classes=CLASSES)["per_class"]
    precision, recall, _, support = sk.precision_recall_fscore_support(
        true, predicted, labels=range(4), zero_division=np.nan
    )
    for k, name in enumerate(CLASSES):
        assert metrics[name]["n"] == support[k]
        for key, expected in (("recall", recall[k]), ("precision", precision[k])):
            assert metrics[name][key] is None if np.isnan(expected) else metrics[name][key] == pytest.approx(expected)


@given(pairs_of_codes, st.permutations(range(4)))
def test_nmi_and_ari_do_not_change_when_predicted_clusters_are_renamed(pairs, names):
    true, predicted = columns(pairs)
    renamed = np.array(names)[predicted]
    original, relabelled = (
        classification({"m": ClassPredictions(true, p)}, classes=CLASSES) for p in (predicted, renamed)
    )
    assert original["nmi"] == pytest.approx(relabelled["nmi"], abs=1e-12)
    assert original["ari"] == pytest.approx(relabelled["ari"], abs=1e-12)


@given(st.lists(st.tuples(st.integers(-1, 3), code), max_size=40), st.lists(st.tuples(code, code), max_size=40))
def test_pooling_modalities_equals_scoring_their_rows_together(first, second):
    first, second = ([*rows, (-1, 0)] for rows in (first, second))
    parts = {"x": ClassPredictions(*columns(first)), "y": ClassPredictions(*columns(second))}
    pooled = classification(parts, classes=CLASSES)
    together = classification({"all": ClassPredictions(*columns(first + second))}, classes=CLASSES)
    of_one = together["modalities"]["all"]
    assert {key: pooled[key] for key in of_one} == of_one
    assert pooled["n"] + pooled["unlabelled"] == len(first) + len(second)


def test_unlabelled_rows_are_counted_and_affect_no_metric():
    with_unknown = ClassPredictions(codes(0, 1, -1, -1), codes(0, 0, 1, 2))
    without = ClassPredictions(codes(0, 1), codes(0, 0))
    metrics = classification({"m": with_unknown}, classes=CLASSES)
    assert metrics["unlabelled"] == 2 and metrics["n"] == 2
    expected = classification({"m": without}, classes=CLASSES)["modalities"]["m"]
    assert metrics["modalities"]["m"] == {**expected, "unlabelled": 2}


@pytest.mark.parametrize("true", [codes(), codes(-1, -1)], ids=["no rows", "only unlabelled rows"])
def test_metrics_without_labelled_rows_are_null_in_json(true):
    result = classification({"m": ClassPredictions(true, np.zeros_like(true))}, classes=CLASSES)
    read = json.loads(json.dumps(result, allow_nan=False))
    names = ("balanced_accuracy", "mean_modality_balanced_accuracy", "macro_f1", "nmi", "ari")
    assert [read[name] for name in names] == [None] * 5
    assert read["per_class"]["a"] == {"recall": None, "precision": None, "n": 0}
    assert headline(result) == {}


def test_mean_modality_balanced_accuracy_leaves_out_a_modality_without_rows():
    parts = {
        "x": ClassPredictions(codes(0, 0, 1, 1), codes(0, 0, 1, 0)),
        "y": ClassPredictions(codes(2), codes(2)),
        "none": ClassPredictions(codes(-1), codes(0)),
    }
    assert classification(parts, classes=CLASSES)["mean_modality_balanced_accuracy"] == pytest.approx((0.75 + 1) / 2)


def test_recall_of_an_absent_pair_is_that_of_its_class_in_its_modality():
    parts = {
        "x": ClassPredictions(codes(0, 0, 1), codes(0, 0, 1)),
        "y": ClassPredictions(codes(0, 0, 0, 1), codes(0, 1, 1, 1)),
    }
    pairs = [("a", "y"), ("d", "x"), ("a", "unknown")]
    assert classification(parts, classes=CLASSES, absent_pairs=pairs)["absent_pairs"] == [
        {"label": "a", "modality": "y", "recall": pytest.approx(1 / 3), "n": 3},
        {"label": "d", "modality": "x", "recall": None, "n": 0},
        {"label": "a", "modality": "unknown", "recall": None, "n": 0},
    ]


def test_headline_is_flat_and_omits_undefined_metrics():
    parts = {"x": ClassPredictions(codes(0, 1), codes(0, 1)), "y": ClassPredictions(codes(-1), codes(0))}
    assert headline(classification(parts, classes=CLASSES)) == {
        "balanced_accuracy": 1.0,
        "mean_modality_balanced_accuracy": 1.0,
        "macro_f1": 1.0,
        "nmi": 1.0,
        "ari": 1.0,
        "balanced_accuracy/x": 1.0,
    }


def test_a_prediction_that_is_not_a_class_is_refused():
    with pytest.raises(AssertionError, match="class codes"):
        classification({"m": ClassPredictions(codes(0), codes(4))}, classes=CLASSES)


# --- features -----------------------------------------------------------------------------------------------


def features(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(3, 2, (rows, width)).astype(np.float32)


@given(st.integers(2, 12), st.integers(1, 5), st.integers(0, 99))
def test_all_pairs_mse_is_the_mean_over_ordered_pairs(rows, width, seed):
    x = features(rows, width, seed).astype(np.float64)
    differences = [np.square(x[i] - x[j]).mean() for i in range(rows) for j in range(rows) if i != j]
    assert all_pairs_mse(x.astype(np.float32)) == pytest.approx(np.mean(differences), rel=1e-6)


def test_all_pairs_mse_is_twice_the_error_of_predicting_the_unbiased_mean():
    x = features(50, 4)
    assert all_pairs_mse(x) == pytest.approx(2 * np.var(x.astype(np.float64), axis=0, ddof=1).mean())


def reconstruction_mse(predicted: np.ndarray, truth: np.ndarray) -> float:
    names = ids(*map(str, range(len(truth))))
    return translation({"x": truth}, {"x": names}, lambda _a, _b, rows: predicted[rows])["mse"]["x"]["x"]


def test_errors_do_not_depend_on_the_block_size(monkeypatch):
    x, y = features(100, 3), features(100, 3, seed=1)
    whole = reconstruction_mse(x, y), all_pairs_mse(x)
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 7)
    assert (reconstruction_mse(x, y), all_pairs_mse(x)) == pytest.approx(whole, rel=1e-12)
    assert whole[0] == pytest.approx(sk.mean_squared_error(y.astype(float), x.astype(float)))


def test_mse_of_large_offsets_keeps_float64_digits():
    x = np.full((1000, 10), 16_000_000, np.float32)
    assert reconstruction_mse(x, x + 1) == 1.0


def ids(*names: str) -> np.ndarray:
    return np.array(names, object)


def toy() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    x = {"x": features(4, 3), "y": features(3, 2, seed=1), "z": features(1, 5, seed=2)}
    return x, {"x": ids("p1", "p2", "p3", "p4"), "y": ids("p4", "p9", "p2"), "z": ids("p7")}


def test_translation_pairs_rows_by_sample_and_scores_against_the_other_modality():
    x, names = toy()

    def decode(a: str, b: str, rows: np.ndarray) -> np.ndarray:
        if a == b:
            return x[a][rows] + 2
        truth = {"p2": x[b][2], "p4": x[b][0]} if b == "y" else {"p2": x[b][1], "p4": x[b][3]}
        return np.stack([truth[sample] for sample in names[a][rows]]) + (1 if b == "y" else 3)

    result = translation(x, names, decode)
    assert result["mse"] == {
        "x": {"x": pytest.approx(4, rel=1e-6), "y": pytest.approx(1, rel=1e-6), "z": None},
        "y": {"x": pytest.approx(9, rel=1e-6), "y": pytest.approx(4, rel=1e-6), "z": None},
        "z": {"x": None, "y": None, "z": pytest.approx(4, rel=1e-6)},
    }
    assert result["pairs"] == {
        "x": {"x": 4, "y": 2, "z": 0},
        "y": {"x": 2, "y": 3, "z": 0},
        "z": {"x": 0, "y": 0, "z": 1},
    }
    assert result["all_pairs_baseline"] == {
        "x": pytest.approx(all_pairs_mse(x["x"])),
        "y": pytest.approx(all_pairs_mse(x["y"])),
        "z": None,
    }


def test_translation_decodes_no_more_rows_at_a_time_than_a_block(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 4)
    x = {"x": features(10, 2)}
    seen: list[int] = []

    def decode(_a: str, b: str, rows: np.ndarray) -> np.ndarray:
        seen.extend(rows)
        assert len(rows) <= 4
        return x[b][rows]

    assert translation(x, {"x": ids(*map(str, range(10)))}, decode)["mse"] == {"x": {"x": 0.0}}
    assert seen == list(range(10))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_translation_that_is_not_finite_is_null_in_json(bad):
    x = {"x": features(3, 2)}
    result = translation(x, {"x": ids("a", "b", "c")}, lambda _a, _b, rows: np.full((len(rows), 2), bad, np.float32))
    assert json.loads(json.dumps(result, allow_nan=False))["mse"] == {"x": {"x": None}}
