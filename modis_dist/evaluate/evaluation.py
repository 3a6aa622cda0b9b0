"""Judging a trained model on held-out rows: classes, reconstructions and translations, alignment, baseline.

Everything is computed on preprocessed features; classes and translations from mu, the alignment probe from sampled z,
because modality always hides in mu below the noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from modis_dist import metrics
from modis_dist.data.store.index import Features, Rows
from modis_dist.evaluate import baseline, probe
from modis_dist.evaluate.predictor import Predictor
from modis_dist.metrics import Scored
from modis_dist.train.prepare import Prepared, Subset
from modis_dist.train.seeds import mix


@dataclass(frozen=True)
class Latent:
    """Latent means and what they belong to, by modality; for figures."""

    mu: Mapping[str, Features]
    label: Mapping[str, Rows]


@dataclass(frozen=True)
class Probe:
    """The alignment probe learns from these rows, with this seed."""

    train: Subset
    seed: int


def evaluate(
    predictor: Predictor, subset: Subset, *, absent_pairs: Sequence[tuple[str, str]] = (), probing: Probe | None = None
) -> dict[str, Any]:
    """Figures of a model on the preprocessed rows of ``subset``.

    Keys: ``classification``, ``translation`` and, where asked for, ``probe``; their shapes stand in ``metrics`` and
    ``probe``.
    """
    encoded = {m: predictor.encode_prepared(x, modality=m) for m, x in subset.x.items()}
    mu = {m: both[0] for m, both in encoded.items()}
    scored = {m: Scored(subset.label[m], predictor.classify(mu[m]).argmax(1)) for m in mu}

    def decode(source: str, target: str, rows: Rows) -> Features:
        like = subset.x[target][rows] if source == target else None
        return predictor.decode(mu[source][rows], modality=target, like=like)

    result: dict[str, Any] = {
        "classification": metrics.classification(scored, classes=predictor.classes, absent_pairs=absent_pairs),
        "translation": metrics.translation(subset.x, subset.sample_id, decode),
    }
    if probing is not None:
        learnt_from = {m: predictor.encode_prepared(x, modality=m) for m, x in probing.train.x.items()}
        result["probe"] = probe.alignment(
            _sampled(learnt_from, probing.seed, "train"), _sampled(encoded, probing.seed, "held out"), seed=probing.seed
        )
    return result


def latent(predictor: Predictor, subset: Subset) -> Latent:
    """Latent means of every row of a subset."""
    return Latent({m: predictor.encode_prepared(x, modality=m)[0] for m, x in subset.x.items()}, subset.label)


def plain_baseline(prepared: Prepared, subset: Subset) -> dict[str, Any]:
    """Logistic regression per modality, fitted on the training rows and scored on the rows of ``subset``."""
    train = {m: (x, prepared.train.label[m]) for m, x in prepared.train.x.items()}
    held_out = {m: (x, subset.label[m]) for m, x in subset.x.items()}
    return baseline.logistic_regression(train, held_out, classes=prepared.classes, storage=prepared.storage)


def _sampled(encoded: Mapping[str, tuple[Features, Features]], seed: int, name: str) -> dict[str, Features]:
    """One draw z = mu + sigma * noise of every row."""
    drawn = {}
    for modality, (mu, logvar) in encoded.items():
        noise = np.random.default_rng(mix(seed, "probe", name, modality)).standard_normal(mu.shape, dtype=np.float32)
        drawn[modality] = mu + np.exp(0.5 * logvar) * noise
    return drawn
