"""Evaluation of the model in a folder on a store: its training store, or any other."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from modis_dist.config.parse import load_run
from modis_dist.config.run import Run
from modis_dist.data.store.arrays import FeatureStorage, RowView
from modis_dist.data.store.index import UNLABELLED, Features, Index, Rows, Strings
from modis_dist.data.store.reader import Store
from modis_dist.data.store.stored_rows import StoredRows
from modis_dist.evaluate.evaluation import Probe, evaluate, plain_baseline
from modis_dist.evaluate.predictor import Predictor
from modis_dist.evaluate.results import RUN, StoreEvaluation
from modis_dist.runtime.errors import DataError
from modis_dist.train.placement import storage_of
from modis_dist.train.prepare import Subset, data_key, load_cohort, prepare, select, training_rows
from modis_dist.train.seeds import mix


def evaluate_folder(folder: Path, store: Path) -> StoreEvaluation:
    """Evaluate the model of a folder on a store.

    On its training store, uses the test rows of its split, or the validation rows if there are none, and computes the
    baseline and the modality probe. On any other store, uses all rows of classes that the model was trained on; rows
    that share a sample or group id with a training row are excluded if the training store still exists.
    """
    predictor, opened = Predictor.open(folder), Store.open(store)
    run = load_run(_run_file(predictor.path))
    storage = storage_of(run, opened)
    if data_key(run, opened.fingerprint) != predictor.data:
        return _evaluate_elsewhere(predictor, opened, training_ids(run, predictor), storage=storage)
    prepared = prepare(run, load_cohort(opened, run.data, storage=storage), test=True)
    subset = prepared.test or prepared.validation
    if subset is None:
        raise DataError(f"{folder}: the run has neither test nor validation rows; see data.split")
    probing = Probe(prepared.train, mix(run.seed, "probe"))
    return {
        "rows": "test" if prepared.test else "validation",
        "left_out": 0,
        "training_rows_left_out": sum(prepared.train.rows().values()),
        "evaluation": evaluate(predictor, subset, absent_pairs=prepared.absent_pairs, probing=probing),
        "baseline": plain_baseline(prepared, subset),
    }


def _run_file(path: Path) -> Path:
    """Return the ``run.yaml`` that belongs to ``best/step-*``."""
    file = path.parent.parent / RUN
    if not file.exists():
        raise DataError(f"{file}: is missing; it holds the settings of the model")
    return file


@dataclass(frozen=True)
class TrainingIds:
    """Sample and group ids of a model's training rows, over all modalities."""

    samples: frozenset[str]
    groups: frozenset[str]

    def contain(self, index: Index) -> NDArray[np.bool_]:
        """Return a mask [n] of the rows that share a sample or group id with a training row."""
        pairs = zip(index.sample_id, index.group_id, strict=True)
        return np.array([sample in self.samples or group in self.groups for sample, group in pairs], dtype=bool)


def training_ids(run: Run, predictor: Predictor) -> TrainingIds | None:
    """Return the ids of a model's training rows from its training store; None if that is gone or changed.

    The model itself stores no ids of samples or patients.
    """
    folder = _run_file(predictor.path).parent
    # A simulated store is in the folder of its run or of its study (study/trials/ID, study/model).
    parents = [folder, folder.parent, folder.parent.parent]
    simulated = [store for parent in parents for store in sorted(parent.glob("store-*"))]
    for path in [Path(run.data.store)] if run.data.store else simulated:
        try:
            store = Store.open(path)
        except (DataError, OSError):
            continue
        if data_key(run, store.fingerprint) == predictor.data:
            selection = select(store, run.data)
            _, training = training_rows(run, selection)
            parts = [selection.index[m].take(training[m].rows) for m in selection.modalities]
            return TrainingIds(
                frozenset(name for part in parts for name in part.sample_id),
                frozenset(name for part in parts for name in part.group_id),
            )
    return None


def _evaluate_elsewhere(
    predictor: Predictor, store: Store, trained_on: TrainingIds | None, *, storage: FeatureStorage
) -> StoreEvaluation:
    """Evaluate a model on a store that it was not trained with."""
    subset, unknown, known = _new_rows(predictor, store, trained_on, storage=storage)
    if not any(subset.rows().values()):
        raise DataError(
            f"{store.path}: no row is left to evaluate ({unknown} of classes unknown to the model, {known} with "
            "the sample or group id of a training row)"
        )
    return {
        "rows": "all",
        "left_out": unknown,
        "training_rows_left_out": None if trained_on is None else known,
        "evaluation": evaluate(predictor, subset),
        "baseline": None,
    }


def _new_rows(
    predictor: Predictor, store: Store, trained_on: TrainingIds | None, *, storage: FeatureStorage
) -> tuple[Subset, int, int]:
    """Return the store's rows of known classes that were not trained on, preprocessed as in training.

    Also returns the numbers of excluded rows: of unknown classes, and training rows of known classes.
    """
    modalities = [m for m in store.modalities if m in predictor.modalities]
    if not modalities:
        raise DataError(f"{store.path}: has none of the model's modalities ({', '.join(predictor.modalities)})")
    unknown = -2
    codes = [predictor.classes.index(c) if c in predictor.classes else unknown for c in store.classes]
    code = np.array([*codes, UNLABELLED])
    x, labels, sample_ids = dict[str, Features](), dict[str, Rows](), dict[str, Strings]()
    num_unknown, num_trained = 0, 0
    for modality in modalities:
        index = store.index(modality)
        label = code[index.label]
        is_unknown = label == unknown
        is_trained = np.zeros(len(index), dtype=bool) if trained_on is None else trained_on.contain(index) & ~is_unknown
        num_unknown, num_trained = num_unknown + int(is_unknown.sum()), num_trained + int(is_trained.sum())
        rows = np.flatnonzero(~is_unknown & ~is_trained)
        x[modality] = predictor.transform(
            _aligned(predictor, store, modality, rows), modality=modality, storage=storage
        )
        labels[modality], sample_ids[modality] = label[rows], index.sample_id[rows]
    return Subset(x, labels, sample_ids), num_unknown, num_trained


def _aligned(predictor: Predictor, store: Store, modality: str, rows: Rows) -> RowView:
    """Return rows of a store with the model's features in its order. Raises ``DataError`` naming missing features."""
    position = {name: column for column, name in enumerate(store.features(modality))}
    features = predictor.features(modality)
    missing = [name for name in features if name not in position]
    if missing:
        raise DataError(
            f"{store.path}: modality {modality} lacks {len(missing)} of the model's features ({', '.join(missing[:5])})"
        )
    columns = np.array([position[name] for name in features])
    in_order = len(columns) == len(position) and (columns == np.arange(len(columns))).all()
    return RowView(StoredRows(store, modality), rows, None if in_order else columns)
