"""Metrics of a model, from class codes and features on the host.

All classification metrics of a modality come from one contingency table; a validation takes well under a millisecond.
Independent of networks and torch. Returns JSON values, None where a metric is undefined.

Legend: K classes, n rows, p features.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from modis_dist.data.store.index import UNLABELLED, Features, Rows, Strings

Counts = NDArray[np.int64]
Decode = Callable[[str, str, Rows], Features]

LOWER_IS_BETTER = frozenset({"reconstruction_mse"})  # of the metrics that `trainer.metric` accepts
Headline = Literal["balanced_accuracy", "mean_modality_balanced_accuracy", "macro_f1", "nmi", "ari"]
HEADLINES: tuple[Headline, ...] = ("balanced_accuracy", "mean_modality_balanced_accuracy", "macro_f1", "nmi", "ari")
BLOCK_ROWS = 4096
BLOCK_VALUES = 1 << 24  # 128 MiB of float64


# --- classes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassPredictions:
    """True and predicted class codes [n] of one modality; rows whose ``true`` is UNLABELLED are only counted."""

    true: Rows
    predicted: Rows


class ClassMetrics(TypedDict):
    """Metrics of one class over n rows."""

    recall: float | None
    precision: float | None
    n: int


class ModalityMetrics(TypedDict):
    """Classification metrics over the n labelled rows of one modality, or of all modalities pooled."""

    balanced_accuracy: float | None  # mean recall of the classes that occur
    macro_f1: float | None
    nmi: float | None  # normalised by the arithmetic mean
    ari: float | None
    n: int
    unlabelled: int
    per_class: dict[str, ClassMetrics]
    confusion: list[list[int]]  # [K, K], one row per true class


class AbsentPair(TypedDict):
    """Recall of a class in a modality that has no training rows of it."""

    label: str
    modality: str
    recall: float | None
    n: int


class Classification(ModalityMetrics):
    """Classification metrics of all modalities pooled, and of each."""

    mean_modality_balanced_accuracy: float | None
    modalities: dict[str, ModalityMetrics]
    absent_pairs: list[AbsentPair]


def classification(
    predictions: Mapping[str, ClassPredictions],
    *,
    classes: Sequence[str],
    absent_pairs: Sequence[tuple[str, str]] = (),
) -> Classification:
    """Return the classification metrics of predictions by modality.

    ``absent_pairs`` are the (class, modality) pairs without training rows.
    """
    tables = {name: contingency(rows, len(classes)) for name, rows in predictions.items()}
    unlabelled = {name: len(rows.true) - int(tables[name].sum()) for name, rows in predictions.items()}
    modalities = {name: _modality_metrics(tables[name], unlabelled[name], classes) for name in predictions}
    pooled = sum(tables.values(), start=np.zeros((len(classes), len(classes)), np.int64))
    return {
        **_modality_metrics(pooled, sum(unlabelled.values()), classes),
        "mean_modality_balanced_accuracy": _mean([m["balanced_accuracy"] for m in modalities.values()]),
        "modalities": modalities,
        "absent_pairs": [_absent_pair(modalities, label, modality) for label, modality in absent_pairs],
    }


def headline(metrics: Classification) -> dict[str, float]:
    """Return the defined metrics that are plotted over epochs: pooled, then balanced accuracy by modality."""
    values: dict[str, float | None] = {name: metrics[name] for name in HEADLINES}
    values |= {f"balanced_accuracy/{name}": m["balanced_accuracy"] for name, m in metrics["modalities"].items()}
    return {name: value for name, value in values.items() if value is not None}


def contingency(predictions: ClassPredictions, num_classes: int) -> Counts:
    """Return the numbers of labelled rows by true and predicted class, [K, K]."""
    assert predictions.true.shape == predictions.predicted.shape, "one prediction per row"
    labelled = predictions.true != UNLABELLED
    true, predicted = predictions.true[labelled], predictions.predicted[labelled]
    assert not predicted.size or (predicted.min() >= 0 and predicted.max() < num_classes), "predictions are class codes"
    cells = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def _modality_metrics(table: Counts, unlabelled: int, classes: Sequence[str]) -> ModalityMetrics:
    true, predicted, hits = table.sum(1).tolist(), table.sum(0).tolist(), table.diagonal().tolist()
    recall = [_ratio(hit, n) for hit, n in zip(hits, true, strict=True)]
    precision = [_ratio(hit, n) for hit, n in zip(hits, predicted, strict=True)]
    f1 = [_ratio(2 * hit, t + p) for hit, t, p in zip(hits, true, predicted, strict=True)]
    return {
        "balanced_accuracy": _mean(recall),
        "macro_f1": _mean(f1),
        "nmi": normalised_mutual_information(table),
        "ari": adjusted_rand_index(table),
        "n": sum(true),
        "unlabelled": unlabelled,
        "per_class": {
            name: {"recall": r, "precision": p, "n": n}
            for name, r, p, n in zip(classes, recall, precision, true, strict=True)
        },
        "confusion": table.tolist(),
    }


def _absent_pair(modalities: Mapping[str, ModalityMetrics], label: str, modality: str) -> AbsentPair:
    class_metrics = modalities[modality]["per_class"].get(label) if modality in modalities else None
    return {
        "label": label,
        "modality": modality,
        "recall": class_metrics["recall"] if class_metrics else None,
        "n": class_metrics["n"] if class_metrics else 0,
    }


def normalised_mutual_information(table: Counts) -> float | None:
    """Return mutual information over the mean entropy; 1 if true and predicted are one cluster, None without rows."""
    n = int(table.sum())
    if n == 0:
        return None
    entropy_true, entropy_predicted = _entropy(table.sum(1) / n), _entropy(table.sum(0) / n)
    if entropy_true == entropy_predicted == 0:
        return 1.0
    information = entropy_true + entropy_predicted - _entropy(table / n)
    return min(1.0, max(0.0, 2 * information / (entropy_true + entropy_predicted)))


def adjusted_rand_index(table: Counts) -> float | None:
    """Return the agreement of pairs of rows adjusted for chance (Hubert and Arabie 1985, by counting pairs).

    1 for identical groupings, None without rows.
    """
    n = int(table.sum())
    if n == 0:
        return None
    together = int((table**2).sum()) - n
    true_only = int((table.sum(1) ** 2).sum()) - n - together
    predicted_only = int((table.sum(0) ** 2).sum()) - n - together
    if true_only == predicted_only == 0:
        return 1.0
    apart = n * (n - 1) - together - true_only - predicted_only
    scale = (together + true_only) * (true_only + apart) + (together + predicted_only) * (predicted_only + apart)
    return 2 * (together * apart - true_only * predicted_only) / scale


def _entropy(probability: NDArray[np.float64]) -> float:
    """Return the entropy in nats."""
    positive = probability[probability > 0]
    return abs(float(positive @ np.log(positive)))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the defined values."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


# --- features -----------------------------------------------------------------------------------------------


def all_pairs_mse(x: Features) -> float:
    """Return the mean over pairs of different rows and over features of (x_i - x_j)^2, for x [n, p] with n > 1.

    Closed form: sum_{i != j} (x_i - x_j)^2 = 2 n sum_i (x_i - mean)^2.
    """
    n, p = x.shape
    assert n > 1 and p, "at least two rows"
    mean = x.mean(0, dtype=np.float64)
    squares = math.fsum(np.square(x[rows] - mean).sum() for rows in _blocks(n, p))
    return float(2 * squares / ((n - 1) * p))


class Translation(TypedDict):
    """Mean squared errors of reconstruction and translation, keys ``[encoded][decoded]``."""

    mse: dict[str, dict[str, float | None]]  # None without paired rows or if not finite
    pairs: dict[str, dict[str, int]]  # number of rows that ``mse`` averages
    all_pairs_baseline: dict[str, float | None]  # ``all_pairs_mse`` of each modality


def translation(x: Mapping[str, Features], sample_id: Mapping[str, Strings], decode: Decode) -> Translation:
    """Return the errors of every reconstruction and translation, over the samples measured in both modalities.

    ``x[m]`` is [n, p_m] and ``sample_id[m]`` its [n] ids, unique within m. ``decode(a, b, rows)`` returns rows of a
    decoded as modality b, [len(rows), p_b]; each call has at most ``BLOCK_ROWS`` rows.
    """
    row_of = {name: {sample: row for row, sample in enumerate(ids)} for name, ids in sample_id.items()}
    paired = {a: {b: _paired_rows(row_of[a], row_of[b]) for b in x} for a in x}
    return {
        "mse": {a: {b: _decoded_mse(x[b], *paired[a][b], a, b, decode) for b in x} for a in x},
        "pairs": {a: {b: len(paired[a][b][0]) for b in x} for a in x},
        "all_pairs_baseline": {m: _finite(all_pairs_mse(rows)) if len(rows) > 1 else None for m, rows in x.items()},
    }


def _paired_rows(first: Mapping[str, int], second: Mapping[str, int]) -> tuple[Rows, Rows]:
    """Return the row numbers of the samples in ``first`` and ``second``, in the order of ``first``."""
    pairs = [(row, second[sample]) for sample, row in first.items() if sample in second]
    rows = np.array(pairs, np.int64).reshape(-1, 2)
    return rows[:, 0], rows[:, 1]


def _decoded_mse(truth: Features, rows: Rows, truth_rows: Rows, a: str, b: str, decode: Decode) -> float | None:
    if not len(rows):
        return None
    n, p = len(rows), truth.shape[1]
    total = sum(_squared_error(decode(a, b, rows[part]), truth[truth_rows[part]]) for part in _blocks(n, p))
    return _finite(total / (n * p))


def _squared_error(predicted: Features, truth: Features) -> float:
    """Return the float64 sum of squared differences, in blocks so that the data is not copied."""
    assert predicted.shape == truth.shape, "the same shape"
    parts = ((predicted[rows], truth[rows]) for rows in _blocks(*truth.shape))
    return math.fsum(np.square(np.subtract(a, b, dtype=np.float64)).sum() for a, b in parts)


def _blocks(n: int, p: int) -> Iterator[slice]:
    """Return slices of n rows of at most ``BLOCK_ROWS`` rows and ``BLOCK_VALUES`` values."""
    rows = max(1, min(BLOCK_ROWS, BLOCK_VALUES // p))
    return (slice(start, start + rows) for start in range(0, n, rows))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
