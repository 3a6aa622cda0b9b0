"""Preparation of a training's arrays from a store: select rows, apply the scenario, preprocess features.

Raw features are read in blocks: from memory or, if prepared features are stored on disk, from the store each time.
Preprocessing is fitted on training rows only. Test rows are prepared only on request.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from modis_dist.config.parse import digest, to_tree
from modis_dist.config.run import COUNTS, Data, Pca, PreprocessStep, Run, VarianceFilter
from modis_dist.data import preprocess, scenario
from modis_dist.data.preprocess import Pipeline
from modis_dist.data.scenario import TrainingRows
from modis_dist.data.split import Partition, partition
from modis_dist.data.store.arrays import (
    BYTES_PER_VALUE,
    FeatureStorage,
    Matrix,
    RowView,
    refuse_insufficient_scratch,
    slices,
)
from modis_dist.data.store.index import UNLABELLED, Features, Index, Rows, Strings
from modis_dist.data.store.reader import Store
from modis_dist.data.store.stored_rows import StoredRows
from modis_dist.model.networks import Shape, widths
from modis_dist.runtime.errors import ConfigError, DataError, nearest
from modis_dist.runtime.text import shown


@dataclass(frozen=True)
class Selection:
    """The rows of a store that a run may use: row metadata by modality, in the order of the networks."""

    fingerprint: str
    classes: tuple[str, ...]
    index: Mapping[str, Index]
    rows: Mapping[str, Rows]  # positions in the store
    counted: dict[str, "RowCounts"] = field(default_factory=dict, repr=False, compare=False)  # see ``row_counts``

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return tuple(self.index)


@dataclass(frozen=True)
class RowCounts:
    """Numbers of training, validation and test rows by modality."""

    train: Mapping[str, int]
    validation: Mapping[str, int]
    test: Mapping[str, int]


SelectionOf = Callable[[Run], Selection]


@dataclass(frozen=True)
class Cohort:
    """A selection and its raw features, in memory or read from the store each time."""

    selection: Selection
    features: Mapping[str, tuple[str, ...]]
    x: Mapping[str, Matrix]
    storage: FeatureStorage = "memory"  # of the features prepared from them


@dataclass(frozen=True)
class Subset:
    """Prepared rows of every modality: the input of the networks."""

    x: Mapping[str, Features]
    label: Mapping[str, Rows]  # -1 unlabelled or hidden
    sample_id: Mapping[str, Strings]

    def rows(self) -> dict[str, int]:
        """Return the number of rows by modality."""
        return {modality: len(x) for modality, x in self.x.items()}


@dataclass(frozen=True)
class Prepared:
    """The prepared data of one training."""

    classes: tuple[str, ...]
    pipelines: Mapping[str, Pipeline]
    train: Subset
    validation: Subset | None
    test: Subset | None
    absent_pairs: tuple[tuple[str, str], ...]  # (class, modality) without a training row
    key: str = ""  # ``data_key`` of the run
    storage: FeatureStorage = "memory"  # of the features

    def class_shares(self) -> NDArray[np.float64]:
        """Return the fraction of each class among the labelled training rows, shape [K]."""
        labels = np.concatenate(list(self.train.label.values()))
        counts = np.bincount(labels[labels >= 0], minlength=len(self.classes))
        shares: NDArray[np.float64] = counts / max(int(counts.sum()), 1)
        return shares


def select(store: Store, data: Data) -> Selection:
    """Return the modalities and classes that ``data`` names. Raises ``ConfigError`` for unknown names."""
    modalities = data.modalities or store.modalities
    _known("data.modalities", modalities, store.modalities, source=str(store.path))
    if len(modalities) < 2:
        raise DataError(f"{store.path}: has one modality ({shown(modalities[0])}); training needs two or more")
    classes = data.classes or store.classes
    _known("data.classes", classes, store.classes, source=str(store.path))
    if len(classes) < 2:
        raise DataError(f"{store.path}: has {len(classes)} class(es); training needs two or more")
    index: dict[str, Index] = {}
    rows: dict[str, Rows] = {}
    left_out = -2
    code = np.array([classes.index(c) if c in classes else left_out for c in store.classes] + [UNLABELLED])
    for modality in modalities:
        full_index = store.index(modality)
        label = code[full_index.label]  # UNLABELLED (-1) picks the last entry
        rows[modality] = np.flatnonzero(label != left_out)
        selected = full_index.take(rows[modality])
        index[modality] = replace(selected, label=label[rows[modality]])
    return Selection(store.fingerprint, tuple(classes), index, rows)


def selections(store: Store) -> SelectionOf:
    """Return a cached ``select`` for runs of one store; runs of a sweep may use different modalities and classes."""
    cache: dict[tuple[object, object], Selection] = {}

    def selection_of(run: Run) -> Selection:
        key = (run.data.modalities, run.data.classes)
        if key not in cache:
            cache[key] = select(store, run.data)
        return cache[key]

    return selection_of


def load_cohort(store: Store, data: Data, *, storage: FeatureStorage) -> Cohort:
    """Return the rows that ``data`` names and their features; ``storage`` is that of prepared features."""
    selection = select(store, data)
    names = {m: store.features(m) for m in selection.modalities}
    if storage == "disk":
        return Cohort(
            selection, names, {m: RowView(StoredRows(store, m), r) for m, r in selection.rows.items()}, storage
        )
    return Cohort(selection, names, {m: store.read(m, rows) for m, rows in selection.rows.items()}, storage)


def training_rows(run: Run, selection: Selection) -> tuple[dict[str, Partition], dict[str, TrainingRows]]:
    """Return the split of a run's rows, and its training rows after the scenario."""
    parts = partition(selection.index, run.data.split, classes=selection.classes)
    training = {modality: part.train for modality, part in parts.items()}
    selected = scenario.apply(run.scenario, selection.index, training, classes=selection.classes, seed=run.seed)
    return parts, selected


def row_counts(run: Run, selection: Selection) -> RowCounts:
    """Return the sizes of a run's split, cached: hundreds of trials share a few splits."""
    key = data_key(run, selection.fingerprint)
    if key not in selection.counted:
        selection.counted[key] = _counted(*training_rows(run, selection))
    return selection.counted[key]


def _counted(parts: Mapping[str, Partition], selected: Mapping[str, TrainingRows]) -> RowCounts:
    train = {modality: len(part.rows) for modality, part in selected.items()}
    validation = {modality: len(part.validation) for modality, part in parts.items()}
    return RowCounts(train, validation, {modality: len(part.test) for modality, part in parts.items()})


def data_key(run: Run, fingerprint: str) -> str:
    """Return a digest that is equal for two runs with the same rows, labels and features."""
    redrawn = any(getattr(step, "seed", 0) is None for step in run.scenario)
    tree = to_tree(run)
    data = {key: value for key, value in tree["data"].items() if key not in {"store", "simulate"}}
    return digest([fingerprint, data, tree["preprocess"], tree["scenario"], run.seed if redrawn else None])


@dataclass(frozen=True)
class PreparationEstimate:
    """Sizes and cost of preparing a run."""

    features: Mapping[str, int]  # of each modality, after preprocessing
    classes: int
    seconds: float  # measured, without principal components
    multiplications: float  # of the principal components, estimated

    def total_seconds(self, per_multiplication: float) -> float:
        """Return the total seconds, given those per multiplication."""
        return self.seconds + self.multiplications * per_multiplication


def estimate_preparation(run: Run, cohort: Cohort) -> PreparationEstimate:
    """Prepare a run without principal components, and estimate their cost.

    Raises as ``prepare``, and ``DataError`` if no validation rows are left.
    """
    start = perf_counter()
    selection = cohort.selection
    parts, selected = _rows(run, selection)
    _refuse_values(run, cohort)
    if not any(len(part.validation) for part in parts.values()):
        raise DataError(f"{run.name}: the split leaves no validation rows; see data.split")
    widths, multiplications = {}, 0.0
    for modality in selection.modalities:
        x, names = cohort.x[modality], cohort.features[modality]
        raw = RowView(x, selected[modality].rows)
        steps = run.preprocess.steps(modality)
        pipeline, widths[modality], left = preprocess.fit_until_pca(steps, raw, features=names, modality=modality)
        for rows in (selected[modality].rows, parts[modality].validation):
            pipeline.apply(RowView(x, rows), storage=cohort.storage)
        multiplications += left
    return PreparationEstimate(widths, len(selection.classes), perf_counter() - start, multiplications)


def prepare(run: Run, cohort: Cohort, *, test: bool = False) -> Prepared:
    """Split, apply the scenario and preprocess; ``test`` also prepares the test rows.

    Raises ``ConfigError`` or ``DataError`` if the run does not fit the data, or its features do not fit the disk.
    """
    selection = cohort.selection
    parts, selected = _rows(run, selection)
    _refuse_values(run, cohort)
    absent = scenario.absent_pairs(selected, selection.index, classes=selection.classes)
    if cohort.storage == "disk":
        features = {modality: len(names) for modality, names in cohort.features.items()}
        sizes = prepared_bytes(run, _counted(parts, selected), features, test=test).values()
        # The baseline standardises one modality after the other; every worker has its own features.
        refuse_insufficient_scratch((sum(sizes) + max(sizes)) * run.trainer.workers)
    train = {m: RowView(cohort.x[m], part.rows) for m, part in selected.items()}
    pipelines = {
        m: preprocess.fit(run.preprocess.steps(m), x, features=cohort.features[m], modality=m) for m, x in train.items()
    }
    rows, labels = ({m: getattr(part, name) for m, part in selected.items()} for name in ("rows", "label"))
    return Prepared(
        selection.classes,
        pipelines,
        _subset(cohort, pipelines, rows, labels),
        _held_out(cohort, pipelines, {m: part.validation for m, part in parts.items()}),
        _held_out(cohort, pipelines, {m: part.test for m, part in parts.items()}) if test else None,
        tuple(absent),
        data_key(run, selection.fingerprint),
        cohort.storage,
    )


def _refuse_values(run: Run, cohort: Cohort) -> None:
    """Raise ``DataError`` for the first value outside the support of its modality's likelihood."""
    for modality, x in cohort.x.items():
        likelihood, names = likelihood_of(run, modality), cohort.features[modality]
        if likelihood == "gaussian":
            continue
        counts = likelihood in COUNTS
        for rows in slices(len(x), len(names)):
            block = x[rows]
            bad = (block < 0) | (block != np.floor(block) if counts else block > 1)
            bad &= ~np.isnan(block)  # missing values are left to preprocessing
            if bad.any():
                row, feature = np.argwhere(bad)[0]
                sample = cohort.selection.index[modality].sample_id[rows.start + row]
                raise DataError(
                    f"modality {shown(modality)}: sample {shown(str(sample))} has {block[row, feature]:g} in feature "
                    f"{shown(names[feature])}; model.modalities.{modality}.likelihood {likelihood} needs "
                    + ("counts (whole numbers, 0 or more)" if counts else "values from 0 to 1")
                )


def prepared_bytes(run: Run, counts: RowCounts, features: Mapping[str, int], *, test: bool) -> dict[str, int]:
    """Return the bytes of the prepared features of every modality, given its number of raw ``features``."""
    sizes = {}
    for modality, validation_rows in counts.validation.items():
        rows = counts.train[modality] + validation_rows + (counts.test[modality] if test else 0)
        width = _prepared_width(run.preprocess.steps(modality), features[modality])
        sizes[modality] = BYTES_PER_VALUE * rows * width
    return sizes


def _prepared_width(steps: Sequence[PreprocessStep], features: int) -> int:
    """Return the number of features after preprocessing; ``prepare`` refuses steps that need more than there are."""
    for step in steps:
        if isinstance(step, VarianceFilter):
            features = min(features, step.features)
        elif isinstance(step, Pca):
            features = min(features, step.components)
    return features


def shape(run: Run, features: Mapping[str, int], classes: int) -> Shape:
    """Return the sizes of the networks. Raises ``ConfigError`` if sizes in the configuration differ from the data."""
    problems = []
    if run.model.classes not in (None, classes):
        problems.append(f"model.classes: is {run.model.classes}, but the data has {classes} classes")
    for modality, net in run.model.modalities.items():
        if modality not in features:
            hint = nearest(modality, list(features)) or "; the data has " + ", ".join(features)
            problems.append(f"model.modalities.{shown(modality)}: no such modality{hint}")
        elif net.features not in (None, features[modality]):
            problems.append(
                f"model.modalities.{modality}.features: is {net.features}, but preprocessing gives {features[modality]}"
            )
    if problems:
        raise ConfigError(problems, source=run.name)
    return build_shape(run, features, classes)


def build_shape(run: Run, features: Mapping[str, int], classes: int) -> Shape:
    """Return the sizes of the networks for given numbers of features."""
    nets = run.model.modalities
    hidden = {}
    for modality, p in features.items():
        ratios = nets[modality].ratios if modality in nets else None
        hidden[modality] = widths(p, ratios or run.model.ratios)
    return Shape(
        dict(features),
        hidden,
        run.model.latent,
        classes,
        run.model.discriminator,
        run.model.batchnorm_eps,
        run.model.leaky_slope,
        {modality: likelihood_of(run, modality) for modality in features},
    )


def likelihood_of(run: Run, modality: str) -> str:
    """Return the likelihood of a modality."""
    nets = run.model.modalities
    return nets[modality].likelihood if modality in nets else "gaussian"


def stated_shape(run: Run) -> Shape | None:
    """Return the sizes of the networks stated in the configuration, or None if some depend on the data."""
    nets = run.model.modalities
    stated = {modality: net.features for modality, net in nets.items() if net.features is not None}
    if run.model.classes is None or len(stated) < 2 or len(stated) < len(nets):
        return None
    if run.data.modalities is not None and set(run.data.modalities) != set(stated):
        return None
    return build_shape(run, {m: stated[m] for m in run.data.modalities or stated}, run.model.classes)


def _held_out(cohort: Cohort, pipelines: Mapping[str, Pipeline], rows: Mapping[str, Rows]) -> Subset | None:
    """Return the subset of rows with their stored labels, or None without rows."""
    if not any(map(len, rows.values())):
        return None
    return _subset(cohort, pipelines, rows, {m: cohort.selection.index[m].label[rows[m]] for m in rows})


def _subset(
    cohort: Cohort, pipelines: Mapping[str, Pipeline], rows: Mapping[str, Rows], label: Mapping[str, Rows]
) -> Subset:
    x = {m: pipelines[m].apply(RowView(cohort.x[m], rows[m]), storage=cohort.storage) for m in rows}
    return Subset(x, label, {m: cohort.selection.index[m].sample_id[rows[m]] for m in rows})


def _rows(run: Run, selection: Selection) -> tuple[dict[str, Partition], dict[str, TrainingRows]]:
    """``training_rows``, checked. Raises ``ConfigError`` or ``DataError`` if they are too few."""
    _known("preprocess.modalities", run.preprocess.modalities, selection.modalities, source=run.name)
    parts, selected = training_rows(run, selection)
    for modality, part in selected.items():
        if len(part.rows) < 2:  # which BatchNorm and the pairing loss need
            raise DataError(
                f"{run.name}: modality {shown(modality)} has {len(part.rows)} training row(s) left; 2 are needed; "
                "change data.split or scenario"
            )
    return parts, selected


def _known(key: str, names: Sequence[str] | Mapping[str, object], known: Sequence[str], *, source: str) -> None:
    problems = [
        f"{key}: {shown(name)!r} is not in the store{nearest(name, list(known)) or '; known: ' + ', '.join(known)}"
        for name in names
        if name not in known
    ]
    if problems:
        raise ConfigError(problems, source=source)
