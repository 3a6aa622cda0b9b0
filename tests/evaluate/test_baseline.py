"""The logistic-regression baseline compared with a scikit-learn pipeline, and with few labelled rows."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modis_dist.evaluate import baseline
from modis_dist.evaluate.baseline import logistic_regression, standardised

CLASSES = ("a", "b", "c")


def blobs(rows: int, seed: int, *, width: int = 6, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    """Three classes around centres that are the same for every seed; features of unequal scale."""
    centres = np.random.default_rng(99).normal(size=(3, width))
    draw = np.random.default_rng(seed)
    label = np.arange(rows) % 3
    x = centres[label] + spread * draw.normal(size=(rows, width))
    return (x * np.logspace(-2, 2, width) + 5).astype(np.float32), label.astype(np.int64)


def test_the_baseline_equals_scikit_learn_on_standardised_rows_with_cross_validated_c():
    (x, y), (test_x, true) = blobs(150, 0), blobs(90, 1)
    result = logistic_regression({"m": (x, y)}, {"m": (test_x, true)}, classes=CLASSES)
    c = cross_validated(x, y)
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(x, y).predict(test_x)
    counts = [[int(((true == i) & (expected == j)).sum()) for j in range(3)] for i in range(3)]
    assert result["confusion"] == counts
    assert 0.4 < result["balanced_accuracy"] < 1  # otherwise the check would be trivial
    assert (result["max_iter"], result["converged"]) == (1000, True)
    assert result["fits"]["m"] == {"C": c, "converged": True, "reason": None}


@pytest.mark.parametrize(("width", "spread", "rows"), [(60, 3.0, 60), (6, 0.8, 300), (200, 1.0, 30)])
def test_c_is_chosen_by_cross_validation_of_the_training_rows(width, spread, rows):
    x, y = blobs(rows, 3, width=width, spread=spread)
    assert baseline.chosen_c(x, y) == cross_validated(x, y)


def test_c_is_small_for_noise_and_large_for_separated_classes_of_unequal_size():
    draw = np.random.default_rng(5)
    wide, y = draw.normal(size=(90, 80)).astype(np.float32), np.arange(90) % 2
    wide[:, 0] += 2 * y  # one feature in eighty is informative
    assert baseline.chosen_c(wide, y) == 0.01
    rare = np.r_[np.zeros(400, np.int64), np.ones(12, np.int64)]
    narrow = (draw.normal(size=(412, 2)) + 2.5 * rare[:, None]).astype(np.float32)
    assert baseline.chosen_c(narrow, rare) == 1.0


def test_c_is_the_default_with_too_few_labelled_rows_and_rare_classes_are_left_out():
    x, y = blobs(120, 0)
    assert baseline.chosen_c(x[:6], y[:6]) == baseline.UNTUNED  # two rows of each class
    rare = np.r_[y, [3, 3]]
    assert baseline.chosen_c(np.r_[x, x[:2]], rare) in baseline.CHOICES


def cross_validated(x: np.ndarray, y: np.ndarray) -> float:
    """Return the chosen C from a loop over folds, with rows shuffled as in the baseline."""
    draw = np.random.default_rng(0).permutation(len(y))
    x, y = (x - x.mean(0, dtype=np.float64))[draw] / x.std(0, dtype=np.float64), y[draw]
    folds = list(StratifiedKFold(3, shuffle=True, random_state=0).split(x, y))

    def score(c: float) -> float:
        fitted = [(LogisticRegression(C=c, max_iter=1000).fit(x[a], y[a]), b) for a, b in folds]
        return float(np.mean([balanced_accuracy_score(y[b], model.predict(x[b])) for model, b in fitted]))

    return max((0.01, 0.1, 1.0), key=score)


def test_unlabelled_rows_neither_train_nor_count():
    (x, y), (test_x, true) = blobs(150, 0), blobs(90, 1)
    junk = np.full((40, x.shape[1]), 1e6, np.float32)
    unknown = np.full(40, -1, np.int64)
    train = {"m": (np.concatenate([junk, x]), np.concatenate([unknown, y]))}
    test = {"m": (np.concatenate([test_x, junk]), np.concatenate([true, unknown]))}
    clean = logistic_regression({"m": (x, y)}, {"m": (test_x, true)}, classes=CLASSES)
    result = logistic_regression(train, test, classes=CLASSES)
    assert result["confusion"] == clean["confusion"]
    assert (result["n"], result["unlabelled"]) == (90, 40)


def test_a_modality_without_labels_is_left_unscored_with_a_reason():
    (x, y), test = blobs(60, 0), blobs(30, 1)
    train = {"m": (x, y), "bare": (x, np.full_like(y, -1))}
    tests = {"m": test, "bare": test, "untrained": test}
    result = logistic_regression(train, tests, classes=CLASSES)
    for name in ("bare", "untrained"):
        assert result["modalities"][name]["balanced_accuracy"] is None
        assert (result["fits"][name]["C"], result["fits"][name]["reason"]) == (None, "no labelled training row")
    assert result["n"] == 30
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_a_modality_with_one_labelled_class_predicts_it_for_every_row():
    (x, _), (test_x, true) = blobs(60, 0), blobs(30, 1)
    train = {"m": (x, np.full(60, 2, np.int64))}
    result = logistic_regression(train, {"m": (test_x, true)}, classes=CLASSES)
    assert [row[2] for row in result["modalities"]["m"]["confusion"]] == [10, 10, 10]
    assert result["modalities"]["m"]["balanced_accuracy"] == pytest.approx(1 / 3)
    assert result["fits"]["m"]["reason"].startswith("one class ")


def test_a_class_absent_in_training_has_recall_0():
    (x, y), test = blobs(150, 0), blobs(90, 1)
    mask = y != 1
    result = logistic_regression({"m": (x[mask], y[mask])}, {"m": test}, classes=CLASSES)
    assert result["per_class"]["b"] == {"recall": 0.0, "precision": None, "n": 30}


def test_a_modality_without_test_rows_has_no_score():
    x, y = blobs(60, 0)
    result = logistic_regression({"m": (x, y)}, {"m": (x[:0], y[:0])}, classes=CLASSES)
    assert result["n"] == 0 and result["balanced_accuracy"] is None


def test_a_regression_that_reaches_max_iter_is_reported_as_not_converged(monkeypatch):
    monkeypatch.setattr(baseline, "MAX_ITER", 2)
    result = logistic_regression({"m": blobs(150, 0)}, {"m": blobs(90, 1)}, classes=CLASSES)
    assert result["converged"] is False and result["fits"]["m"]["converged"] is False
    assert result["max_iter"] == 2 and result["n"] == 90


def test_columns_constant_in_training_are_centred_but_not_scaled():
    constant = np.float32(0.1)  # not exactly the mean of three such rows
    train = np.array([[constant, 1], [constant, 2], [constant, 3]], np.float32)
    left, right = standardised(train, np.array([[constant + 1, 2]], np.float32))
    np.testing.assert_allclose(left, [[0, -(1.5**0.5)], [0, 0], [0, 1.5**0.5]], atol=1e-7)
    np.testing.assert_allclose(right, [[1, 0]], atol=1e-6)
    assert left.dtype == right.dtype == np.float32


def test_standardisation_equals_scikit_learn():
    (x, _), (other, _) = blobs(50, 0), blobs(20, 1)
    scaler = StandardScaler().fit(x.astype(np.float64))
    left, right = standardised(x, other)
    np.testing.assert_allclose(left, scaler.transform(x.astype(np.float64)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(right, scaler.transform(other.astype(np.float64)), rtol=1e-5, atol=1e-6)


@pytest.mark.shared
def test_the_mirna_modality_of_tcga10_is_classified_at_98_percent(shared):
    table = pd.read_parquet(shared / "data" / "tcga10" / "mirna.parquet")
    classes = sorted(table["label"].unique())
    x = table.drop(columns=["sample_id", "label"]).to_numpy(np.float32)
    y = table["label"].map(classes.index).to_numpy(np.int64)
    patients = np.unique(table["sample_id"])
    held_out = table["sample_id"].isin(np.random.default_rng(0).choice(patients, len(patients) // 5, replace=False))
    test = held_out.to_numpy()
    result = logistic_regression({"m": (x[~test], y[~test])}, {"m": (x[test], y[test])}, classes=classes)
    assert result["converged"] and 0.97 < result["balanced_accuracy"] < 0.995
