"""The modality probe: the accuracy of a simple classifier that predicts the modality of a row from its latent vector.

An accuracy at chance (1/M) means that the modalities are aligned. Independent of the networks and of torch. The caller
passes sampled latents z, because differences in mu below the sampling noise do not matter.

M modalities, L latent dimensions.
"""

from collections.abc import Mapping

import numpy as np

from modis_dist.data.store.index import Features, Rows
from modis_dist.evaluate.baseline import predict, standardised

NEIGHBOURS = 15
C = 0.01
"""C of the regression; with hundreds of latent dimensions, a weaker penalty fits noise and overstates alignment."""


def modality_probe(
    train_z: Mapping[str, Features], test_z: Mapping[str, Features], *, seed: int, max_rows: int = 2000
) -> dict[str, float]:
    """Train classifiers on latents ``train_z[m]`` [n_m, L] and score them on ``test_z[m]``.

    Returns the balanced accuracies ``logistic_regression`` and ``knn``, and ``perfect``, the accuracy for aligned
    modalities. The same number of rows of every modality is drawn with ``seed``, at most ``max_rows``, so that chance
    is 1/M. Modalities without training or test rows are ignored.
    """
    names = [name for name in train_z if len(train_z[name]) and len(test_z.get(name, ()))]
    assert names, "a modality with training and test rows"
    perfect = 1 / len(names)
    if len(names) == 1:
        return {"logistic_regression": 1.0, "knn": 1.0, "perfect": perfect}
    x, y = _balanced([train_z[name] for name in names], seed=[seed, 0], max_rows=max_rows)
    test_x, true = _balanced([test_z[name] for name in names], seed=[seed, 1], max_rows=max_rows)
    linear, _ = predict(x, y, test_x, c=C)
    return {
        "logistic_regression": _accuracy(true, linear),
        "knn": _accuracy(true, _nearest(x, y, test_x)),
        "perfect": perfect,
    }


def _balanced(latents: list[Features], *, seed: list[int], max_rows: int) -> tuple[Features, Rows]:
    """Return the same number of rows of each modality, concatenated, and the index of the modality of each row."""
    rows = min(max_rows, *map(len, latents))
    draw = np.random.default_rng(seed)
    chosen = [z[np.sort(draw.choice(len(z), rows, replace=False))] for z in latents]
    return np.concatenate(chosen), np.repeat(np.arange(len(latents)), rows)


def _nearest(x: Features, y: Rows, test_x: Features) -> Rows:
    from sklearn.neighbors import KNeighborsClassifier

    x, test_x = standardised(x, test_x)
    model = KNeighborsClassifier(n_neighbors=min(NEIGHBOURS, len(x)), algorithm="brute").fit(x, y)
    return np.asarray(model.predict(test_x), np.int64)


def _accuracy(true: Rows, predicted: Rows) -> float:
    """Return the accuracy, which is balanced because every modality has the same number of rows."""
    return float((true == predicted).mean())
