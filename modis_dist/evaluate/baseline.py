"""Baseline of every result table: logistic regression of each modality, trained and tested on the same rows.

Independent of the networks and of torch.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits
from typing_extensions import TypedDict

from modis_dist.config.run import Standardise
from modis_dist.data.preprocess import fit
from modis_dist.data.store.arrays import FeatureStorage, Matrix, RowView
from modis_dist.data.store.index import UNLABELLED, Features, Rows
from modis_dist.metrics import Classification, ClassPredictions, classification

CHOICES = (0.01, 0.1, 1.0)  # candidates for C, the inverse strength of the L2 penalty; cross-validation chooses one
UNTUNED = 0.1  # default C if too few rows are labelled for cross-validation
FOLDS = 3
TUNED_ON = 3000  # maximum number of labelled rows for cross-validation; the regression is fitted on all of them
MAX_ITER = 1000  # iterations of lbfgs; ``converged`` is false if a fit reaches it
ONE_THREAD: dict[str, Any] = {"limits": 1, "user_api": "blas"}  # several threads took 20 times longer on busy cores

Labelled = tuple[Features, Rows]


class Fit(TypedDict):
    """Settings and outcome of the regression of one modality."""

    C: float | None  # chosen by cross-validation on the training rows; None without a regression
    converged: bool
    reason: str | None  # why there is no regression


class Baseline(Classification):
    """Classification metrics of the regressions, and how each modality was fitted."""

    fits: dict[str, Fit]
    max_iter: int
    converged: bool  # true if all fits converged


def logistic_regression(
    train: Mapping[str, Labelled],
    test: Mapping[str, Labelled],
    *,
    classes: Sequence[str],
    storage: FeatureStorage = "memory",
) -> Baseline:
    """Fit one multinomial logistic regression per modality and score it on the test rows.

    ``train[m]`` and ``test[m]`` are features [n, p_m] and class codes [n], UNLABELLED where unknown. Only labelled
    training rows are used, standardised by their own mean and deviation; ``storage`` holds them.

    With a single class among its labelled training rows a modality predicts that class; without labelled training rows
    it is not scored (n = 0, metrics None).
    """
    fitted = {name: _one_modality(train.get(name), rows, storage) for name, rows in test.items()}
    fits = {name: fit for name, (_, fit) in fitted.items()}
    return {
        **classification({name: predictions for name, (predictions, _) in fitted.items()}, classes=classes),
        "fits": fits,
        "max_iter": MAX_ITER,
        "converged": all(fit["converged"] for fit in fits.values()),
    }


def _one_modality(train: Labelled | None, test: Labelled, storage: FeatureStorage) -> tuple[ClassPredictions, Fit]:
    x, true = test
    known = train[1] != UNLABELLED if train is not None else np.zeros(0, bool)
    if train is None or not known.any():
        no_rows = np.zeros(0, np.int64)
        fit: Fit = {"C": None, "converged": True, "reason": "no labelled training row"}
        return ClassPredictions(no_rows, no_rows), fit
    labels = train[1][known]
    if (labels == labels[0]).all():
        fit = {"C": None, "converged": True, "reason": "one class among the labelled training rows"}
        return ClassPredictions(true, np.full_like(true, labels[0])), fit
    labelled = RowView(train[0], np.flatnonzero(known))
    c = chosen_c(labelled, labels)
    predicted, converged = predict(labelled, labels, x, c=c, storage=storage)
    return ClassPredictions(true, predicted), {"C": c, "converged": converged, "reason": None}


def chosen_c(x: Matrix, label: Rows) -> float:
    """Return the C of ``CHOICES`` with the best balanced accuracy in stratified cross-validation of rows x [n, p].

    Classes with fewer rows than folds are left out; with fewer than two classes left, C is ``UNTUNED``.
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
    with threadpool_limits(**ONE_THREAD), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the final regression reports its own convergence
        search.fit(standardised(x, x[:0])[0], label)
    return float(search.best_params_["C"])


def predict(
    train_x: Matrix, train_y: Rows, test_x: Matrix, *, c: float, storage: FeatureStorage = "memory"
) -> tuple[Rows, bool]:
    """Return the predicted classes [n_test] of a regression with C = ``c``, and true if lbfgs converged.

    ``train_y`` has at least two classes. ``storage`` holds the standardised rows, which lbfgs does not copy.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if not len(test_x):
        return np.zeros(0, np.int64), True
    train_x, test_x = standardised(train_x, test_x, storage=storage)
    model = LogisticRegression(C=c, max_iter=MAX_ITER)
    with threadpool_limits(**ONE_THREAD), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train_x, train_y)
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return np.asarray(model.predict(test_x), np.int64), converged


def standardised(train: Matrix, other: Matrix, *, storage: FeatureStorage = "memory") -> tuple[Features, Features]:
    """Return two [n, p] arrays minus the training mean, divided by the training deviation (1 for constant columns)."""
    features = [str(number) for number in range(train.shape[1])]
    fitted = fit([Standardise()], train, features=features, modality="")
    return fitted.apply(train, storage=storage), fitted.apply(other, storage=storage)
