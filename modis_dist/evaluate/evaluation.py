"""Evaluation of a trained model on held-out rows: classes, reconstruction, translation, modality probe, baseline.

All metrics are computed on preprocessed features. Classes and translations use mu; the modality probe uses sampled z,
because differences of mu below the sampling noise always reveal the modality.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from modis_dist import metrics
from modis_dist.data.store.index import Features, Rows
from modis_dist.evaluate.baseline import Baseline, logistic_regression
from modis_dist.evaluate.predictor import Predictor
from modis_dist.evaluate.probe import modality_probe
from modis_dist.evaluate.results import (
    INTERIM_RESULT,
    VERSION,
    Evaluation,
    HeldOut,
    Result,
    write_history,
    write_result,
)
from modis_dist.metrics import ClassPredictions
from modis_dist.train.prepare import Prepared, Subset
from modis_dist.train.progress import Progress
from modis_dist.train.seeds import mix
from modis_dist.train.stack import Member


@dataclass(frozen=True)
class Probe:
    """Training rows and seed of the modality probe."""

    train: Subset
    seed: int


def evaluate_training(
    member: Member,
    progress: Progress,
    *,
    evaluated_on: HeldOut,
    probe: bool,
    baselines: dict[str, Baseline],
    device: str | torch.device = "cpu",
) -> Result:
    """Return the final result of a training: its best model evaluated on held-out rows, or the reason it failed.

    ``baselines`` caches the baselines of the stack by ``Prepared.key``; a new one is added. Writes the history; the
    caller writes the result last (``write_result``).
    """
    result = unevaluated_result(member, progress, evaluated_on=evaluated_on)
    prepared = member.prepared
    subset = getattr(prepared, evaluated_on)
    if progress.status == "done" and subset is not None:
        predictor = Predictor.open(member.folder, device=device)
        probing = Probe(prepared.train, mix(member.run.seed, "probe")) if probe else None
        result["evaluation"] = evaluate(predictor, subset, absent_pairs=prepared.absent_pairs, probing=probing)
        if prepared.key not in baselines:
            baselines[prepared.key] = plain_baseline(prepared, subset)
        result["baseline"] = baselines[prepared.key]
    write_history(member.folder, progress.history)
    return result


def write_interim_result(member: Member, progress: Progress, *, evaluated_on: HeldOut) -> None:
    """Write the history and the interim result of a training that is not finished."""
    write_history(member.folder, progress.history)
    result = unevaluated_result(member, progress, evaluated_on=evaluated_on)
    write_result(member.folder, result, name=INTERIM_RESULT)


def unevaluated_result(member: Member, progress: Progress, *, evaluated_on: HeldOut) -> Result:
    """Return the result of a training without an evaluation of its model."""
    return {
        "version": VERSION,
        "trial": member.trial,
        "status": progress.status,
        "reason": progress.reason,
        "epochs": progress.epochs,
        "best_epoch": progress.best_epoch,
        "changes": progress.changes,
        "metric": member.run.trainer.metric,
        "value": progress.best_value,
        "evaluated_on": evaluated_on,
        "training_rows": member.prepared.train.rows(),
        "evaluation": None,
        "baseline": None,
    }


def evaluate(
    predictor: Predictor, subset: Subset, *, absent_pairs: Sequence[tuple[str, str]] = (), probing: Probe | None = None
) -> Evaluation:
    """Return the metrics of a model on the preprocessed rows of ``subset``."""
    encoded = {m: predictor.encode_prepared(x, modality=m) for m, x in subset.x.items()}
    mu = {m: mean for m, (mean, _) in encoded.items()}
    predictions = {m: ClassPredictions(subset.label[m], predictor.classify(mu[m]).argmax(1)) for m in mu}

    def decode(source: str, target: str, rows: Rows) -> Features:
        like = subset.x[target][rows] if source == target else None
        return predictor.decode(mu[source][rows], modality=target, like=like)

    probe = None
    if probing is not None:
        train = {m: predictor.encode_prepared(x, modality=m) for m, x in probing.train.x.items()}
        probe = modality_probe(
            _sampled(train, probing.seed, "train"), _sampled(encoded, probing.seed, "held out"), seed=probing.seed
        )
    return {
        "classification": metrics.classification(predictions, classes=predictor.classes, absent_pairs=absent_pairs),
        "translation": metrics.translation(subset.x, subset.sample_id, decode),
        "probe": probe,
    }


def latent_means(predictor: Predictor, subset: Subset) -> dict[str, Features]:
    """Return mu [n, L] of every row of a subset, by modality."""
    return {m: predictor.encode_prepared(x, modality=m)[0] for m, x in subset.x.items()}


def plain_baseline(prepared: Prepared, subset: Subset) -> Baseline:
    """Return the baseline fitted on the training rows and scored on the rows of ``subset``."""
    train = {m: (x, prepared.train.label[m]) for m, x in prepared.train.x.items()}
    held_out = {m: (x, subset.label[m]) for m, x in subset.x.items()}
    return logistic_regression(train, held_out, classes=prepared.classes, storage=prepared.storage)


def _sampled(encoded: Mapping[str, tuple[Features, Features]], seed: int, name: str) -> dict[str, Features]:
    """Return one sample z = mu + sigma * noise of every row."""
    z = {}
    for modality, (mu, logvar) in encoded.items():
        noise = np.random.default_rng(mix(seed, "probe", name, modality)).standard_normal(mu.shape, dtype=np.float32)
        z[modality] = mu + np.exp(0.5 * logvar) * noise
    return z
