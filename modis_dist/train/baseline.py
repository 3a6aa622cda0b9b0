"""What plain logistic regression makes of the same rows: the figure that every result table carries.

Knows neither networks nor torch.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.index import UNLABELLED, Features, Rows
from modis_dist.train.metrics import Scored, classification

C = 0.01
"""Inverse strength of the L2 penalty: strong, as suits hundreds of correlated features and few rows per class."""

MAX_ITER = 1000
"""Iterations of lbfgs at most; a regression stopped by it is reported with ``converged`` false."""

Labelled = tuple[Features, Rows]


def logistic_regression(
    train: Mapping[str, Labelled], test: Mapping[str, Labelled], *, classes: Sequence[str]
) -> dict[str, Any]:
    """One multinomial logistic regression per modality, scored on the test rows.

    ``train[m]`` and ``test[m]`` are features [n, p_m] and class codes [n], UNLABELLED where unknown; only labelled
    training rows are used, standardised by their own mean and deviation.

    Returns what ``metrics.classification`` returns, with ``C``, ``max_iter`` and ``converged``, the latter also per
    modality with ``reason``: None, or why there is no regression. A modality whose labelled training rows are all of
    one class predicts that class; one without any is not scored (n = 0, figures None).
    """
    outcomes = {name: _one_modality(train.get(name), rows) for name, rows in test.items()}
    result = classification({name: scored for name, (scored, _) in outcomes.items()}, classes=classes)
    for name, (_, facts) in outcomes.items():
        result["modalities"][name] |= facts
    converged = all(facts["converged"] for _, facts in outcomes.values())
    return {**result, "C": C, "max_iter": MAX_ITER, "converged": converged}


def _one_modality(train: Labelled | None, test: Labelled) -> tuple[Scored, dict[str, Any]]:
    x, true = test
    known = train[1] != UNLABELLED if train is not None else np.zeros(0, bool)
    if train is None or not known.any():
        nothing = np.zeros(0, np.int64)
        return Scored(nothing, nothing), {"converged": True, "reason": "no labelled training row"}
    labels = train[1][known]
    if (labels == labels[0]).all():
        reason = "one class among the labelled training rows"
        return Scored(true, np.full_like(true, labels[0])), {"converged": True, "reason": reason}
    predicted, converged = predict(train[0][known], labels, x, penalty=C)
    return Scored(true, predicted), {"converged": converged, "reason": None}


def predict(train_x: Features, train_y: Rows, test_x: Features, *, penalty: float) -> tuple[Rows, bool]:
    """Classes [n_test] that a regression with C = ``penalty`` predicts, and whether lbfgs converged.

    There are at least two classes in ``train_y``.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    train_x, test_x = standardised(train_x, test_x)
    if not len(test_x):
        return np.zeros(0, np.int64), True
    model = LogisticRegression(C=penalty, max_iter=MAX_ITER)
    # One BLAS thread: the products are small, and threads that wait for each other on busy cores took 20 times longer.
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train_x, train_y)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return np.asarray(model.predict(test_x), np.int64), converged


def standardised(train: Features, other: Features) -> tuple[Features, Features]:
    """Both [n, p] less the training mean, over the training deviation; columns constant in training only shifted."""
    mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    constant = (train == train[:1]).all(0)  # the deviation of a constant may be a rounding error instead of 0
    scale = np.where(constant, 1.0, deviation)
    return _scaled(train, mean, scale), _scaled(other, mean, scale)


def _scaled(x: Features, mean: NDArray[np.float64], scale: NDArray[np.float64]) -> Features:
    return ((x - mean) / scale).astype(np.float32)
