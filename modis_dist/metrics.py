"""Figures of merit of a model, from class codes and features on the host.

Everything about classes comes from one contingency table per modality, so that a validation costs well under a
millisecond. Knows neither networks nor torch. Returns plain values that JSON can hold, None where one is undefined.

K classes, n rows, p features.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.store.index import UNLABELLED, Features, Rows, Strings

Counts = NDArray[np.int64]
Decode = Callable[[str, str, Rows], Features]

LOWER_IS_BETTER = frozenset({"reconstruction_mse"})  # of the figures that may be chosen by
HEADLINES = ("balanced_accuracy", "mean_modality_balanced_accuracy", "macro_f1", "nmi", "ari")
BLOCK_ROWS = 4096
BLOCK_VALUES = 1 << 24  # 128 MiB of float64


# --- classes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """Class codes [n] of one modality; rows whose ``true`` is UNLABELLED enter no figure and are counted apart."""

    true: Rows
    predicted: Rows


def classification(
    scored: Mapping[str, Scored], *, classes: Sequence[str], absent_pairs: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """How well classes are predicted, per modality and with the rows of all modalities pooled.

    ``absent_pairs`` are the (class, modality) pairs without training rows, whose recall is listed apart.

    Returns ``balanced_accuracy`` (mean recall of the classes that occur), ``mean_modality_balanced_accuracy``,
    ``macro_f1``, ``nmi`` (arithmetic mean), ``ari``, ``n``, ``unlabelled``, ``per_class``, ``confusion`` (rows true),
    ``modalities`` (the same for each) and ``absent_pairs``.
    """
    tables = {name: contingency(rows, len(classes)) for name, rows in scored.items()}
    unlabelled = {name: len(rows.true) - int(tables[name].sum()) for name, rows in scored.items()}
    modalities = {name: _figures(tables[name], unlabelled[name], classes) for name in scored}
    pooled = sum(tables.values(), start=np.zeros((len(classes), len(classes)), np.int64))
    return {
        **_figures(pooled, sum(unlabelled.values()), classes),
        "mean_modality_balanced_accuracy": _mean([m["balanced_accuracy"] for m in modalities.values()]),
        "modalities": modalities,
        "absent_pairs": [_absent(modalities, label, modality) for label, modality in absent_pairs],
    }


def headline(result: Mapping[str, Any]) -> dict[str, float]:
    """The defined figures of ``classification`` worth a curve, flat: pooled, then balanced accuracy per modality."""
    figures = {name: result[name] for name in HEADLINES}
    figures |= {f"balanced_accuracy/{m}": held["balanced_accuracy"] for m, held in result["modalities"].items()}
    return {name: value for name, value in figures.items() if value is not None}


def contingency(scored: Scored, num_classes: int) -> Counts:
    """Rows counted by true [K] and predicted [K] class, the unlabelled left out."""
    assert scored.true.shape == scored.predicted.shape, "one prediction per row"
    labelled = scored.true != UNLABELLED
    true, predicted = scored.true[labelled], scored.predicted[labelled]
    assert not predicted.size or (predicted.min() >= 0 and predicted.max() < num_classes), "predictions are class codes"
    cells = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def _figures(table: Counts, unlabelled: int, classes: Sequence[str]) -> dict[str, Any]:
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


def _absent(modalities: Mapping[str, Any], label: str, modality: str) -> dict[str, Any]:
    nothing = {"recall": None, "n": 0}
    held = modalities.get(modality, {}).get("per_class", {}).get(label, nothing)
    return {"label": label, "modality": modality, "recall": held["recall"], "n": held["n"]}


def normalised_mutual_information(table: Counts) -> float | None:
    """Mutual information over the mean of both entropies; 1 where both sides are one cluster, None without rows."""
    n = int(table.sum())
    if n == 0:
        return None
    entropy_true, entropy_predicted = _entropy(table.sum(1) / n), _entropy(table.sum(0) / n)
    if entropy_true == entropy_predicted == 0:
        return 1.0
    shared = entropy_true + entropy_predicted - _entropy(table / n)
    return min(1.0, max(0.0, 2 * shared / (entropy_true + entropy_predicted)))


def adjusted_rand_index(table: Counts) -> float | None:
    """Agreement of pairs of rows, adjusted for chance (Hubert and Arabie 1985, in the pair-counting form).

    1 where the two groupings are the same, None without rows.
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
    spread = (together + true_only) * (true_only + apart) + (together + predicted_only) * (predicted_only + apart)
    return 2 * (together * apart - true_only * predicted_only) / spread


def _entropy(share: NDArray[np.float64]) -> float:
    """In nats."""
    positive = share[share > 0]
    return abs(float(positive @ np.log(positive)))


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Over the defined values."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


# --- features -----------------------------------------------------------------------------------------------


def mse(predicted: Features, truth: Features) -> float:
    """Mean over rows and features of the squared difference of two [n, p] arrays, n > 0."""
    assert predicted.shape == truth.shape and truth.size, "the same rows and features, and some"
    return _squared_error(predicted, truth) / truth.size


def all_pairs_mse(x: Features) -> float:
    """Mean over ordered pairs of different rows and over features of (x_i - x_j)^2, for x [n, p] with n > 1.

    In closed form: sum_{i != j} (x_i - x_j)^2 = 2 n sum_i (x_i - mean)^2.
    """
    n, p = x.shape
    assert n > 1 and p, "a pair of rows"
    mean = x.mean(0, dtype=np.float64)
    squares = math.fsum(np.square(x[rows] - mean).sum() for rows in _blocks(n, p))
    return float(2 * squares / ((n - 1) * p))


def translation(x: Mapping[str, Features], sample_id: Mapping[str, Strings], decode: Decode) -> dict[str, Any]:
    """Mean squared error of every reconstruction and translation, over the samples measured in both modalities.

    ``x[m]`` is [n, p_m] and ``sample_id[m]`` its [n] ids, unique within m. ``decode(a, b, rows)`` gives rows of a
    decoded as modality b, [len(rows), p_b]; it is called for at most ``BLOCK_ROWS`` rows at a time.

    Returns ``mse`` {a: {b: value}} (a = b is the reconstruction of all rows of a; None without paired rows or where
    not finite), ``pairs`` {a: {b: rows}} and ``all_pairs_baseline`` {m: value}.
    """
    where = {name: {sample: row for row, sample in enumerate(ids)} for name, ids in sample_id.items()}
    matched = {a: {b: _paired_rows(where[a], where[b]) for b in x} for a in x}
    return {
        "mse": {a: {b: _decoded_mse(x[b], *matched[a][b], a, b, decode) for b in x} for a in x},
        "pairs": {a: {b: len(matched[a][b][0]) for b in x} for a in x},
        "all_pairs_baseline": {m: _finite(all_pairs_mse(rows)) if len(rows) > 1 else None for m, rows in x.items()},
    }


def _paired_rows(first: Mapping[str, int], second: Mapping[str, int]) -> tuple[Rows, Rows]:
    """Row numbers of the samples that are in both, in the order of the first."""
    pairs = [(row, second[sample]) for sample, row in first.items() if sample in second]
    both = np.array(pairs, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _decoded_mse(truth: Features, rows: Rows, truth_rows: Rows, a: str, b: str, decode: Decode) -> float | None:
    if not len(rows):
        return None
    n, p = len(rows), truth.shape[1]
    total = sum(_squared_error(decode(a, b, rows[part]), truth[truth_rows[part]]) for part in _blocks(n, p))
    return _finite(total / (n * p))


def _squared_error(predicted: Features, truth: Features) -> float:
    """Sum in float64, block by block so that no second copy of the data is made."""
    assert predicted.shape == truth.shape, "the same rows and features"
    parts = ((predicted[rows], truth[rows]) for rows in _blocks(*truth.shape))
    return math.fsum(np.square(np.subtract(a, b, dtype=np.float64)).sum() for a, b in parts)


def _blocks(n: int, p: int) -> Iterator[slice]:
    """Slices of n rows with p features each; fewer than ``BLOCK_ROWS`` where these are many."""
    rows = max(1, min(BLOCK_ROWS, BLOCK_VALUES // p))
    return (slice(start, start + rows) for start in range(0, n, rows))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
