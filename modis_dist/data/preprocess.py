"""Preprocessing of features: steps are fitted on training rows, applied to any rows and inverted for translations.

Computes in float64 on blocks of rows and returns float32, so memory does not grow with the data. Missing values (NaN)
are ignored when fitting and pass through every step but ``impute``; none may be left at the end. Independent of how
rows are split and where features are stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modis_dist.config.run import Impute, Log1p, MinMax, Pca, PreprocessStep, Standardise, VarianceFilter
from modis_dist.data.pca import randomized_pca
from modis_dist.data.store.arrays import FeatureStorage, Matrix, materialise, slices
from modis_dist.data.store.index import Features
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.text import listed, shown

Block = NDArray[np.float64]

VALUES_FOR_MEDIANS = 1 << 26  # values per block of features (512 MiB of float64); each block is a pass over all rows
VALUES_FOR_FULL_PCA = 1 << 24  # `auto` is incremental above; the full solver holds several copies of all values
VALUES_FOR_RANDOMIZED_PCA = 1 << 26  # above, blockwise with several passes; below, two copies in memory (1 GiB)
STEPS = frozenset({"standardise", "minmax", "log1p", "impute", "variance_filter", "pca"})


@dataclass(frozen=True)
class Fitted:
    """The parameters of one fitted step; shape [features] unless stated otherwise.

    standardise: mean, scale; minmax: minimum, range; log1p: none; impute: value; variance_filter: kept (int64 [kept],
    sorted positions), mean (of all input features); pca: mean, components [components, features].
    """

    kind: str
    arrays: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Pipeline:
    """The fitted steps of one modality, in order."""

    modality: str
    features_in: tuple[str, ...]
    steps: tuple[Fitted, ...]

    @property
    def features_out(self) -> tuple[str, ...]:
        """Feature names after the last step; principal components are pc1, pc2, ..."""
        names = self.features_in
        for step in self.steps:
            names = _names_after(step, names)
        return names

    def apply(self, x: Matrix, *, storage: FeatureStorage = "memory") -> Features:
        """Transform rows [n, features_in] to float32 [n, features_out], kept in memory or on disk.

        Raises ``DataError`` for infinite values, negative input of log1p, and values missing after the last step.
        """
        with np.errstate(over="ignore"):  # values beyond float32 become infinite and raise below
            return materialise((len(x), len(self.features_out)), self._transformed(x), storage=storage)

    def _transformed(self, x: Matrix) -> Iterator[NDArray[np.float32]]:
        for _, block in _blocks(self, x):
            result = block.astype(np.float32)
            if not np.isfinite(result).all():
                _refuse_missing(self, x)
                raise DataError(f"modality {shown(self.modality)}: values exceed float32 after preprocessing")
            yield result

    def inverse(self, y: Features) -> Features:
        """Map preprocessed rows [n, features_out] back to the units of the data, float32 [n, features_in].

        Imputed values are kept. Features dropped by variance_filter get their training mean; dropped principal
        components count as zero. Values beyond float32 become infinite.
        """
        assert y.shape[1] == len(self.features_out)
        out = np.empty((len(y), len(self.features_in)), dtype=np.float32)
        with np.errstate(over="ignore"):
            for rows in slices(len(y), max(out.shape[1], y.shape[1])):
                block = y[rows].astype(np.float64)
                for step in reversed(self.steps):
                    block = _inverted(step, block)
                out[rows] = block
        return out

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, object]]:
        """Return arrays named ``<step>.<name>`` and a JSON description, the inverse of ``from_arrays``."""
        arrays = {f"{i}.{name}": array for i, step in enumerate(self.steps) for name, array in step.arrays.items()}
        kinds = [step.kind for step in self.steps]
        return arrays, {"modality": self.modality, "features_in": list(self.features_in), "steps": kinds}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], description: Mapping[str, Any]) -> "Pipeline":
        """Rebuild a pipeline from ``to_arrays``. Raises ``DataError`` for a step that this version does not know."""
        unknown = [kind for kind in description["steps"] if kind not in STEPS]
        if unknown:
            raise DataError(f"preprocess: unknown step {shown(unknown[0])}; the model was trained by another version")
        steps = []
        for number, kind in enumerate(description["steps"]):
            prefix = f"{number}."
            fitted = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            steps.append(Fitted(kind, fitted))
        return cls(description["modality"], tuple(description["features_in"]), tuple(steps))


def fit(steps: Sequence[PreprocessStep], x: Matrix, *, features: Sequence[str], modality: str) -> Pipeline:
    """Fit the steps, in order, to the training rows ``x``, shape [n, features].

    Raises ``DataError`` for infinite values, negative input of log1p, impute of a feature without values,
    variance_filter with more features than the input has, and pca with missing values or with more components than
    rows or features.
    """
    assert x.shape[1] == len(features)
    pipeline = Pipeline(modality, tuple(features), ())
    for step in steps:
        pipeline = Pipeline(modality, pipeline.features_in, (*pipeline.steps, _fitted(step, pipeline, x)))
    return pipeline


def fit_until_pca(
    steps: Sequence[PreprocessStep], x: Matrix, *, features: Sequence[str], modality: str
) -> tuple[Pipeline, int, float]:
    """Fit the steps before the first pca, which may take hours for many features.

    Returns that partial pipeline, the number of features after all steps, and the approximate number of skipped
    multiplications. Raises as ``fit`` for every check that does not need the result of a pca.
    """
    first = next((number for number, step in enumerate(steps) if isinstance(step, Pca)), len(steps))
    pipeline = fit(steps[:first], x, features=features, modality=modality)
    width, skipped = len(pipeline.features_out), 0.0
    for step in steps[first:]:
        if isinstance(step, Pca):
            _refuse_components(step, modality, rows=len(x), features=width)
            skipped += float(len(x)) * width * min(len(x), width)
            width = step.components
        elif isinstance(step, VarianceFilter):
            _refuse_features(step, modality, features=width)
            width = step.features
    if first < len(steps):
        _refuse_missing(pipeline, x)
    return pipeline, width, skipped


# --- one step -------------------------------------------------------------------------------------------------


def _fitted(step: PreprocessStep, before: Pipeline, x: Matrix) -> Fitted:
    """Fit a step to the output of the steps before it."""
    match step:
        case Standardise():
            moments = _moments(before, x)
            scale = np.where(moments.variance > 0, np.sqrt(moments.variance), 1.0)
            return Fitted("standardise", {"mean": moments.mean, "scale": scale})
        case MinMax():
            moments = _moments(before, x)
            return Fitted("minmax", {"minimum": moments.minimum, "range": moments.maximum - moments.minimum})
        case Log1p():
            _refuse_negative(before, x)
            return Fitted("log1p", {})
        case Impute():
            return Fitted("impute", {"value": _fill_values(step, before, x)})
        case VarianceFilter():
            return _variance_filter(step, before, x)
        case Pca():
            return _pca(step, before, x)


def _applied(step: Fitted, block: Block) -> Block:
    a = step.arrays
    result: Block
    match step.kind:
        case "standardise":
            result = (block - a["mean"]) / a["scale"]
        case "minmax":
            result = (block - a["minimum"]) * _reciprocal(a["range"])
        case "log1p":
            result = np.log1p(block)
        case "impute":
            result = np.where(np.isnan(block), a["value"], block)
        case "variance_filter":
            result = block[:, a["kept"]]
        case _:
            result = (block - a["mean"]) @ a["components"].T
    return result


def _inverted(step: Fitted, block: Block) -> Block:
    a = step.arrays
    result: Block = block
    match step.kind:
        case "standardise":
            result = block * a["scale"] + a["mean"]
        case "minmax":
            result = block * a["range"] + a["minimum"]
        case "log1p":
            result = np.expm1(block)
        case "variance_filter":
            result = np.tile(a["mean"], (len(block), 1))
            result[:, a["kept"]] = block
        case "pca":
            result = block @ a["components"] + a["mean"]
    return result


def _names_after(step: Fitted, names: tuple[str, ...]) -> tuple[str, ...]:
    if step.kind == "variance_filter":
        return tuple(names[position] for position in step.arrays["kept"])
    if step.kind == "pca":
        return tuple(f"pc{number + 1}" for number in range(len(step.arrays["components"])))
    return names


def _reciprocal(spread: Block) -> Block:
    """Return 1 / spread, or 0 where spread is 0: a constant feature becomes 0, missing values stay missing."""
    return np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)


# --- fitting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Moments:
    """Statistics of the non-missing values, per feature; 0 for a feature without values."""

    count: Block
    mean: Block
    variance: Block  # divided by count
    minimum: Block
    maximum: Block


def _moments(before: Pipeline, x: Matrix) -> _Moments:
    count, total, low, high = (np.full(len(before.features_out), start) for start in (0.0, 0.0, np.inf, -np.inf))
    for _, block in _blocks(before, x):
        count += np.isfinite(block).sum(axis=0)
        total += np.nansum(block, axis=0)
        low, high = np.fmin(low, np.fmin.reduce(block)), np.fmax(high, np.fmax.reduce(block))
    divisor = np.maximum(count, 1)
    # A constant feature must have exactly its value as mean and variance 0; a sum has rounding errors.
    mean = np.clip(total / divisor, low, high, where=count > 0, out=np.zeros_like(total))
    squares = np.zeros_like(total)
    for _, block in _blocks(before, x):
        squares += np.nansum((block - mean) ** 2, axis=0)
    low, high = (np.where(count > 0, limit, 0.0) for limit in (low, high))
    return _Moments(count, mean, squares / divisor, low, high)


def _fill_values(step: Impute, before: Pipeline, x: Matrix) -> Block:
    moments = _moments(before, x)
    if not moments.count.all():
        empty = _features(before.features_out, moments.count == 0)
        where = f"modality {shown(before.modality)}: impute: no value in any training row for {empty}"
        raise DataError(f"{where}; remove them, or add variance_filter before impute")
    return moments.mean if step.strategy == "mean" else _medians(before, x)


def _medians(before: Pipeline, x: Matrix) -> Block:
    """Return the medians, computed per block of features, because a median needs all rows of a feature."""
    features = len(before.features_out)
    medians = np.empty(features)
    for columns in slices(features, len(x), values=VALUES_FOR_MEDIANS):
        values = np.empty((len(x), columns.stop - columns.start))
        for rows, block in _blocks(before, x):
            values[rows] = block[:, columns]
        medians[columns] = np.nanmedian(values, axis=0)
    return medians


def _variance_filter(step: VarianceFilter, before: Pipeline, x: Matrix) -> Fitted:
    _refuse_features(step, before.modality, features=len(before.features_out))
    moments = _moments(before, x)
    kept = np.sort(np.argsort(-moments.variance, kind="stable")[: step.features]).astype(np.int64)
    return Fitted("variance_filter", {"kept": kept, "mean": moments.mean})


def _pca(step: Pca, before: Pipeline, x: Matrix) -> Fitted:
    """Fit a pca; signs are as in scikit-learn (the largest loading of every component is positive)."""
    rows, features = len(x), len(before.features_out)
    _refuse_components(step, before.modality, rows=rows, features=features)
    _refuse_missing(before, x)
    if step.solver == "randomized" and rows * features > VALUES_FOR_RANDOMIZED_PCA:
        shape, blocks = (rows, features), partial(_blocks, before, x)
        mean, components = randomized_pca(blocks, shape, components=step.components, seed=step.seed)
        return Fitted("pca", {"mean": mean, "components": components})
    incremental = step.solver == "incremental" or (step.solver == "auto" and rows * features > VALUES_FOR_FULL_PCA)
    model = (_incremental_pca if incremental else _in_memory_pca)(step, before, x)
    return Fitted("pca", {"mean": model.mean_, "components": model.components_})


def _in_memory_pca(step: Pca, before: Pipeline, x: Matrix) -> Any:
    from sklearn.decomposition import PCA  # imported here: takes a second, and few runs need it

    solver = "randomized" if step.solver == "randomized" else "full"
    model = PCA(step.components, svd_solver=solver, random_state=step.seed)
    return model.fit(np.concatenate([block for _, block in _blocks(before, x)]))


def _incremental_pca(step: Pca, before: Pipeline, x: Matrix) -> Any:
    from sklearn.decomposition import IncrementalPCA

    model = IncrementalPCA(step.components)
    for _, block in _blocks(before, x, at_least=5 * step.components):
        model.partial_fit(block, check_input=False)
    return model


# --- blocks of rows -------------------------------------------------------------------------------------------


def _blocks(pipeline: Pipeline, x: Matrix, *, at_least: int = 1) -> Iterator[tuple[slice, Block]]:
    """Yield blocks of rows after the pipeline, in float64."""
    for rows in slices(len(x), x.shape[1], at_least=at_least):
        block = x[rows].astype(np.float64)
        if np.isinf(block).any():
            _refuse_infinite(pipeline, x)
        for number, step in enumerate(pipeline.steps):
            if step.kind == "log1p" and np.fmin.reduce(block, axis=None, initial=0.0) < 0:
                _refuse_negative(Pipeline(pipeline.modality, pipeline.features_in, pipeline.steps[:number]), x)
            block = _applied(step, block)
        yield rows, block


# --- checks ---------------------------------------------------------------------------------------------------


def _refuse_features(step: VarianceFilter, modality: str, *, features: int) -> None:
    if step.features > features:
        where = f"modality {shown(modality)}: variance_filter: features is {step.features}, the input has {features}"
        raise DataError(f"{where}; lower it")


def _refuse_components(step: Pca, modality: str, *, rows: int, features: int) -> None:
    if step.components > min(rows, features):
        where = f"modality {shown(modality)}: pca: components is {step.components}, the maximum for"
        raise DataError(f"{where} {rows} training rows x {features} features is {min(rows, features)}; lower it")


def _refuse_infinite(pipeline: Pipeline, x: Matrix) -> None:
    bad = _rows_where(np.isinf, (x[rows] for rows in slices(len(x), x.shape[1])))
    where = _features(pipeline.features_in, bad > 0)
    raise DataError(f"modality {shown(pipeline.modality)}: infinite values in {where}; correct the data")


def _refuse_negative(before: Pipeline, x: Matrix) -> None:
    bad = _rows_where(lambda block: block < 0, (block for _, block in _blocks(before, x)))
    if bad.any():
        worst = int(np.argmax(bad))
        where = f"{_features(before.features_out, bad > 0)} ({shown(before.features_out[worst])}: {bad[worst]} rows)"
        raise DataError(
            f"modality {shown(before.modality)}: log1p: negative values in {where}; remove log1p or put it first"
        )


def _refuse_missing(pipeline: Pipeline, x: Matrix) -> None:
    """Raise for missing values, with the feature names before pca, which spreads them over all components."""
    kinds = [step.kind for step in pipeline.steps]
    last = kinds.index("pca") if "pca" in kinds else len(kinds)
    before = Pipeline(pipeline.modality, pipeline.features_in, pipeline.steps[:last])
    missing = _rows_where(np.isnan, (block for _, block in _blocks(before, x))) > 0
    if missing.any():
        where = f"modality {shown(pipeline.modality)}: missing values in {_features(before.features_out, missing)}"
        raise DataError(f"{where}; add impute to preprocess")


def _rows_where(test: Callable[[Any], NDArray[np.bool_]], blocks: Iterator[NDArray[Any]]) -> NDArray[np.int64]:
    """Count the rows per feature for which the test is true, shape [features]."""
    counts: NDArray[np.int64] = test(next(blocks)).sum(axis=0, dtype=np.int64)
    for block in blocks:  # one at a time; the counts of all blocks would take much memory
        counts += test(block).sum(axis=0)
    return counts


def _features(names: Sequence[str], selected: NDArray[np.bool_]) -> str:
    """Return the number of selected features and the first names: `3 features (a, b, c)`."""
    chosen = [name for name, is_selected in zip(names, selected, strict=True) if is_selected]
    return f"{len(chosen)} feature{'s' * (len(chosen) != 1)} ({listed(chosen)})"
