"""How well the modalities are aligned: can a simple classifier tell them apart in the latent space?

Knows neither networks nor torch; gets latents that were sampled by the caller (on mu alone modality hides below the
noise and the probe says nothing).

M modalities, L latent dimensions.
"""

from collections.abc import Mapping

import numpy as np

from modis_dist.data.store.index import Features, Rows
from modis_dist.evaluate.baseline import predict, standardised

NEIGHBOURS = 15
C = 0.01
"""Of the regression: with hundreds of latent dimensions a weaker penalty fits noise and flatters the alignment."""


def alignment(
    train_z: Mapping[str, Features], test_z: Mapping[str, Features], *, seed: int, max_rows: int = 2000
) -> dict[str, float]:
    """Balanced accuracy of telling the modality of held-out sampled latents: ``logistic_regression`` and ``knn``.

    ``train_z[m]`` and ``test_z[m]`` are [n_m, L]. Every modality gives the same number of rows, at most ``max_rows``,
    chosen by ``seed``, so that ``perfect`` = 1/M is chance. A modality without rows on either side is left out of M.
    """
    names = [name for name in train_z if len(train_z[name]) and len(test_z.get(name, ()))]
    assert names, "some modality has latents on both sides"
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
    """The same number of rows of each, stacked, and the position of the modality each came from."""
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
    """Every modality has the same number of rows, so plain accuracy is the balanced one."""
    return float((true == predicted).mean())
