"""What plain logistic regression makes of the same rows: the figure that every result table carries.

Knows neither networks nor torch.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from modis_dist.data.store.arrays import FeatureStorage, Matrix, RowView, materialise, slices
from modis_dist.data.store.index import UNLABELLED, Features, Rows
from modis_dist.metrics import Scored, classification

CHOICES = (0.01, 0.1, 1.0)
"""Inverse strengths C of the L2 penalty that are chosen among, so that the baseline is as good as it can be."""

UNTUNED = 0.1
"""C where too few rows are labelled to choose."""

FOLDS = 3
TUNED_ON = 3000
"""Labelled training rows that C is chosen on, at most; the regression itself learns from all of them."""

MAX_ITER = 1000
"""Iterations of lbfgs at most; a regression stopped by it is reported with ``converged`` false."""

Labelled = tuple[Features, Rows]


def logistic_regression(
    train: Mapping[str, Labelled],
    test: Mapping[str, Labelled],
    *,
    classes: Sequence[str],
    storage: FeatureStorage = "memory",
) -> dict[str, Any]:
    """One multinomial logistic regression per modality, scored on the test rows; ``storage`` keeps standardised rows.

    ``train[m]`` and ``test[m]`` are features [n, p_m] and class codes [n], UNLABELLED where unknown; only labelled
    training rows are used, standardised by their own mean and deviation.

    Returns what ``metrics.classification`` returns, with ``max_iter`` and ``converged``. Per modality ``C``, chosen
    by cross-validation of the training rows, ``converged``, and ``reason``: None, or why there is no regression and no
    C. A modality whose labelled training rows are all of one class predicts that class; one without any is not scored
    (n = 0, figures None).
    """
    outcomes = {name: _one_modality(train.get(name), rows, storage) for name, rows in test.items()}
    result = classification({name: scored for name, (scored, _) in outcomes.items()}, classes=classes)
    for name, (_, facts) in outcomes.items():
        result["modalities"][name] |= facts
    converged = all(facts["converged"] for _, facts in outcomes.values())
    return {**result, "max_iter": MAX_ITER, "converged": converged}


def _one_modality(train: Labelled | None, test: Labelled, storage: FeatureStorage) -> tuple[Scored, dict[str, Any]]:
    x, true = test
    known = train[1] != UNLABELLED if train is not None else np.zeros(0, bool)
    if train is None or not known.any():
        nothing = np.zeros(0, np.int64)
        return Scored(nothing, nothing), {"C": None, "converged": True, "reason": "no labelled training row"}
    labels = train[1][known]
    if (labels == labels[0]).all():
        reason = "one class among the labelled training rows"
        return Scored(true, np.full_like(true, labels[0])), {"C": None, "converged": True, "reason": reason}
    labelled = RowView(train[0], np.flatnonzero(known))
    c = chosen_c(labelled, labels)
    predicted, converged = predict(labelled, labels, x, c=c, storage=storage)
    return Scored(true, predicted), {"C": c, "converged": converged, "reason": None}


def chosen_c(x: Matrix, label: Rows) -> float:
    """The C of ``CHOICES`` with the best balanced accuracy in stratified cross-validation of labelled rows x [n, p].

    Classes with fewer rows than folds take no part; ``UNTUNED`` where fewer than two classes are left.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    draw = np.random.default_rng(0).permutation(len(label))[:TUNED_ON]
    draw = draw[(np.bincount(label[draw]) >= FOLDS)[label[draw]]]
    x, label = RowView(x, draw), label[draw]
    if len(np.unique(label)) < 2:
        return UNTUNED
    search = GridSearchCV(
        LogisticRegression(max_iter=MAX_ITER),
        {"C": CHOICES},
        scoring="balanced_accuracy",
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=0),
        refit=False,
    )
    with _one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: the regression that counts reports its own
        search.fit(standardised(x, x[:0])[0], label)
    return float(search.best_params_["C"])


@contextmanager
def _one_thread() -> Iterator[None]:
    """One BLAS thread: products are small, and threads that wait for each other on busy cores took 20 times longer."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def predict(
    train_x: Matrix, train_y: Rows, test_x: Matrix, *, c: float, storage: FeatureStorage = "memory"
) -> tuple[Rows, bool]:
    """Classes [n_test] that a regression with C = ``c`` predicts, and whether lbfgs converged.

    There are at least two classes in ``train_y``. Standardised rows are kept in ``storage``, and lbfgs copies none.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if not len(test_x):
        return np.zeros(0, np.int64), True
    train_x, test_x = standardised(train_x, test_x, storage=storage)
    model = LogisticRegression(C=c, max_iter=MAX_ITER)
    with _one_thread(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train_x, train_y)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return np.asarray(model.predict(test_x), np.int64), converged


def standardised(train: Matrix, other: Matrix, *, storage: FeatureStorage = "memory") -> tuple[Features, Features]:
    """Both [n, p] less the training mean, over the training deviation; columns constant in training only shifted."""
    nothing = np.zeros(train.shape[1])
    mean = sum((block.sum(0, dtype=np.float64) for block in _blocks(train)), start=nothing) / len(train)
    squares = sum((np.square(block - mean).sum(0) for block in _blocks(train)), start=nothing)
    first = train[:1]  # the deviation of a constant may be a rounding error instead of 0
    constant = np.logical_and.reduce([(block == first).all(0) for block in _blocks(train)])
    scale = np.where(constant, 1.0, np.sqrt(squares / len(train)))
    left, right = (
        materialise((len(x), len(mean)), ((block - mean) / scale for block in _blocks(x)), storage=storage)
        for x in (train, other)
    )
    return left, right


def _blocks(x: Matrix) -> Iterator[Features]:
    return (x[rows] for rows in slices(*x.shape))
