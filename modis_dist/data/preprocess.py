"""Preparing features: steps learnt from training rows, applied to any rows, inverted for writing translations.

Works in float64 on blocks of rows and returns float32, so temporaries stay small whatever the size of the data.
Missing values (NaN) pass through every step but ``impute`` and are left out of what is learnt; none may be left at
the end. It must not know which rows are training rows, nor where the features come from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modis_dist.config.run import Impute, Log1p, MinMax, Pca, PreprocessStep, Standardise, Variance
from modis_dist.data.pca import randomized_pca
from modis_dist.data.store.arrays import FeatureStorage, Matrix, materialise, slices
from modis_dist.data.store.index import Features
from modis_dist.runtime.errors import DataError, shown

Block = NDArray[np.float64]

VALUES_FOR_MEDIANS = 1 << 26  # 512 MiB of float64 at once: all rows are gone through for each part of the features
VALUES_FOR_FULL_PCA = 1 << 24  # above, `auto` is incremental: the full solver needs all values, several times
VALUES_FOR_RANDOMIZED_PCA = 1 << 26  # above, rows are gone through again and again; 1 GiB, for all are held twice
STEPS = frozenset({"standardise", "minmax", "log1p", "impute", "variance", "pca"})


@dataclass(frozen=True)
class Fitted:
    """What one step has learnt; every array but pca's ``components`` and variance's ``kept`` has shape [features].

    standardise: mean, scale; minmax: minimum, range; log1p: nothing; impute: value; variance: kept (sorted positions,
    int64), mean (of all its features); pca: mean, components [components, features].
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
        """Names after the last step; principal components are called pc1, pc2, ..."""
        names = self.features_in
        for step in self.steps:
            names = _names_after(step, names)
        return names

    def apply(self, x: Matrix, *, place: FeatureStorage = "memory") -> Features:
        """Prepared rows, float32 [n, features_out], of rows [n, features_in]; kept in memory or on a disk.

        Raises ``DataError`` for infinite values, values below 0 that log1p gets, and values missing at the end.
        """
        with np.errstate(over="ignore"):  # what does not fit becomes infinite and is refused
            return materialise((len(x), len(self.features_out)), self._prepared(x), place=place)

    def _prepared(self, x: Matrix) -> Iterator[NDArray[np.float32]]:
        for _, block in _blocks(self, x):
            prepared = block.astype(np.float32)
            if not np.isfinite(prepared).all():
                _refuse_missing(self, x)
                where = f"modality {shown(self.modality)}"
                raise DataError(f"{where}: has values too large for float32 after preprocessing")
            yield prepared

    def inverse(self, y: Features) -> Features:
        """Rows in the data's units, float32 [n, features_in], of prepared rows [n, features_out].

        Imputed values stay. Features that the variance filter dropped come back as their training mean, what pca
        dropped as nothing. Values beyond float32 become infinite.
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
        """Arrays named ``<step>.<name>`` and a description for JSON; ``from_arrays`` makes the same pipeline."""
        arrays = {f"{i}.{name}": array for i, step in enumerate(self.steps) for name, array in step.arrays.items()}
        kinds = [step.kind for step in self.steps]
        return arrays, {"modality": self.modality, "features_in": list(self.features_in), "steps": kinds}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], description: Mapping[str, Any]) -> "Pipeline":
        """The pipeline that ``to_arrays`` took apart. Raises ``DataError`` for a step unknown to this version."""
        unknown = [kind for kind in description["steps"] if kind not in STEPS]
        if unknown:
            raise DataError(f"preprocess: unknown step {shown(unknown[0])}; made by a newer version")
        steps = []
        for number, kind in enumerate(description["steps"]):
            prefix = f"{number}."
            own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            steps.append(Fitted(kind, own))
        return cls(description["modality"], tuple(description["features_in"]), tuple(steps))


def fit(steps: Sequence[PreprocessStep], x: Matrix, *, features: Sequence[str], modality: str) -> Pipeline:
    """Learn the steps, in order, from the training rows ``x``, shape [n, features].

    Raises ``DataError``: infinite values; values below 0 for log1p; a feature without any value for impute; a variance
    filter that is to keep more features than there are; pca with more components than rows or features, or with
    missing values.
    """
    assert x.shape[1] == len(features)
    pipeline = Pipeline(modality, tuple(features), ())
    for step in steps:
        pipeline = Pipeline(modality, pipeline.features_in, (*pipeline.steps, _learnt(step, pipeline, x)))
    return pipeline


def fit_until_pca(
    steps: Sequence[PreprocessStep], x: Matrix, *, features: Sequence[str], modality: str
) -> tuple[Pipeline, int, float]:
    """What ``fit`` would come to, up to the first pca, which takes minutes to hours where there are many features.

    Returns the pipeline up to there, the features after all steps, and about how many multiplications are left out.
    Raises what ``fit`` raises, but for what steps after a pca refuse of its values.
    """
    first = next((number for number, step in enumerate(steps) if isinstance(step, Pca)), len(steps))
    pipeline = fit(steps[:first], x, features=features, modality=modality)
    width, left = len(pipeline.features_out), 0.0
    for step in steps[first:]:
        if isinstance(step, Pca):
            _refuse_components(step, modality, rows=len(x), features=width)
            left += float(len(x)) * width * min(len(x), width)
            width = step.components
        elif isinstance(step, Variance):
            _refuse_features(step, modality, features=width)
            width = step.features
    if first < len(steps):
        _refuse_missing(pipeline, x)
    return pipeline, width, left


# --- one step -------------------------------------------------------------------------------------------------


def _learnt(step: PreprocessStep, before: Pipeline, x: Matrix) -> Fitted:
    """The step fitted to the rows as the steps before it leave them."""
    match step:
        case Standardise():
            seen = _moments(before, x)
            scale = np.where(seen.variance > 0, np.sqrt(seen.variance), 1.0)
            return Fitted("standardise", {"mean": seen.mean, "scale": scale})
        case MinMax():
            seen = _moments(before, x)
            return Fitted("minmax", {"minimum": seen.minimum, "range": seen.maximum - seen.minimum})
        case Log1p():
            _refuse_negative(before, x)
            return Fitted("log1p", {})
        case Impute():
            return Fitted("impute", {"value": _typical(step, before, x)})
        case Variance():
            return _most_variable(step, before, x)
        case Pca():
            return _principal_components(step, before, x)


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
        case "variance":
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
        case "variance":
            result = np.tile(a["mean"], (len(block), 1))
            result[:, a["kept"]] = block
        case "pca":
            result = block @ a["components"] + a["mean"]
    return result


def _names_after(step: Fitted, names: tuple[str, ...]) -> tuple[str, ...]:
    if step.kind == "variance":
        return tuple(names[position] for position in step.arrays["kept"])
    if step.kind == "pca":
        return tuple(f"pc{number + 1}" for number in range(len(step.arrays["components"])))
    return names


def _reciprocal(spread: Block) -> Block:
    """1 / spread, 0 where the spread is 0: a constant feature becomes 0, and stays missing where it is missing."""
    return np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 0)


# --- learning -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Moments:
    """Of the values that are there, per feature; 0 where a feature has none."""

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
    some = np.maximum(count, 1)
    # A constant's mean is that constant, which a sum may miss by a rounding, and its variance 0.
    mean = np.clip(total / some, low, high, where=count > 0, out=np.zeros_like(total))
    squares = np.zeros_like(total)
    for _, block in _blocks(before, x):
        squares += np.nansum((block - mean) ** 2, axis=0)
    low, high = (np.where(count > 0, limit, 0.0) for limit in (low, high))
    return _Moments(count, mean, squares / some, low, high)


def _typical(step: Impute, before: Pipeline, x: Matrix) -> Block:
    seen = _moments(before, x)
    if not seen.count.all():
        listed = _listed(before.features_out, seen.count == 0)
        where = f"modality {shown(before.modality)}: has no value at all in {listed} over the training rows"
        raise DataError(f"{where}; leave them out, or drop them by `variance` before `impute`")
    return seen.mean if step.value == "mean" else _medians(before, x)


def _medians(before: Pipeline, x: Matrix) -> Block:
    """Medians need all rows of a feature at once, so features are taken a few at a time."""
    features = len(before.features_out)
    medians = np.empty(features)
    for columns in slices(features, len(x), values=VALUES_FOR_MEDIANS):
        values = np.empty((len(x), columns.stop - columns.start))
        for rows, block in _blocks(before, x):
            values[rows] = block[:, columns]
        medians[columns] = np.nanmedian(values, axis=0)
    return medians


def _most_variable(step: Variance, before: Pipeline, x: Matrix) -> Fitted:
    _refuse_features(step, before.modality, features=len(before.features_out))
    seen = _moments(before, x)
    kept = np.sort(np.argsort(-seen.variance, kind="stable")[: step.features]).astype(np.int64)
    return Fitted("variance", {"kept": kept, "mean": seen.mean})


def _principal_components(step: Pca, before: Pipeline, x: Matrix) -> Fitted:
    """The largest loading of every component is positive, as scikit-learn settles it."""
    rows, features = len(x), len(before.features_out)
    _refuse_components(step, before.modality, rows=rows, features=features)
    _refuse_missing(before, x)
    if step.solver == "randomized" and rows * features > VALUES_FOR_RANDOMIZED_PCA:
        shape, blocks = (rows, features), partial(_blocks, before, x)
        mean, components = randomized_pca(blocks, shape, components=step.components, seed=step.seed)
        return Fitted("pca", {"mean": mean, "components": components})
    incremental = step.solver == "incremental" or (step.solver == "auto" and rows * features > VALUES_FOR_FULL_PCA)
    model = (_incremental_pca if incremental else _pca_at_once)(step, before, x)
    return Fitted("pca", {"mean": model.mean_, "components": model.components_})


def _pca_at_once(step: Pca, before: Pipeline, x: Matrix) -> Any:
    from sklearn.decomposition import PCA  # a second to import, and few runs need it

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
    """Blocks of rows as the pipeline leaves them, in float64."""
    for rows in slices(len(x), x.shape[1], at_least=at_least):
        block = x[rows].astype(np.float64)
        if np.isinf(block).any():
            _refuse_infinite(pipeline, x)
        for number, step in enumerate(pipeline.steps):
            if step.kind == "log1p" and np.fmin.reduce(block, axis=None, initial=0.0) < 0:
                _refuse_negative(Pipeline(pipeline.modality, pipeline.features_in, pipeline.steps[:number]), x)
            block = _applied(step, block)
        yield rows, block


# --- refusals -------------------------------------------------------------------------------------------------


def _refuse_features(step: Variance, modality: str, *, features: int) -> None:
    if step.features > features:
        where = f"modality {shown(modality)}: variance cannot keep {step.features} of {features} features"
        raise DataError(f"{where}; lower `features` of the variance step")


def _refuse_components(step: Pca, modality: str, *, rows: int, features: int) -> None:
    if step.components > min(rows, features):
        where = f"modality {shown(modality)}: pca of {rows} training rows x {features} features"
        raise DataError(f"{where} gives {min(rows, features)} components at most, not {step.components}; lower it")


def _refuse_infinite(pipeline: Pipeline, x: Matrix) -> None:
    bad = _rows_where(np.isinf, (x[rows] for rows in slices(len(x), x.shape[1])))
    listed = _listed(pipeline.features_in, bad > 0)
    raise DataError(f"modality {shown(pipeline.modality)}: has infinite values in {listed}; mend the data")


def _refuse_negative(before: Pipeline, x: Matrix) -> None:
    bad = _rows_where(lambda block: block < 0, (block for _, block in _blocks(before, x)))
    if bad.any():
        worst = int(np.argmax(bad))
        where = f"{_listed(before.features_out, bad > 0)} ({shown(before.features_out[worst])}: {bad[worst]} rows)"
        raise DataError(
            f"modality {shown(before.modality)}: log1p got values below 0 in {where}; remove log1p or put it first"
        )


def _refuse_missing(pipeline: Pipeline, x: Matrix) -> None:
    """Names features as they are before pca, which would spread what is missing over all components."""
    kinds = [step.kind for step in pipeline.steps]
    last = kinds.index("pca") if "pca" in kinds else len(kinds)
    before = Pipeline(pipeline.modality, pipeline.features_in, pipeline.steps[:last])
    missing = _rows_where(np.isnan, (block for _, block in _blocks(before, x))) > 0
    if missing.any():
        where = f"modality {shown(pipeline.modality)}: has missing values in {_listed(before.features_out, missing)}"
        raise DataError(f"{where}; add `impute` to preprocess")


def _rows_where(test: Callable[[Any], NDArray[np.bool_]], blocks: Iterator[NDArray[Any]]) -> NDArray[np.int64]:
    """Rows per feature for which the test holds, shape [features]."""
    counts: NDArray[np.int64] = test(next(blocks)).sum(axis=0, dtype=np.int64)
    for block in blocks:  # one after the other: counts of all blocks at once are many where features are
        counts += test(block).sum(axis=0)
    return counts


def _listed(names: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    """`3 features (a, b, c)`: how many, and the first five names."""
    positions = np.flatnonzero(chosen)
    first = ", ".join(shown(names[position]) for position in positions[:5])
    more = ", ..." if len(positions) > 5 else ""
    return f"{len(positions)} feature{'s' * (len(positions) != 1)} ({first}{more})"
