"""Simulation of methylation, expression and protein of cancer subtypes with the InterSIM algorithm.

Chalise, Raghavan, Fridley 2016, Comput Methods Programs Biomed 128:69-74. An independent implementation of the
published description: same distribution as the R package, different random numbers. Given its class, the three omics
of a sample are independent; only the sets of shifted features are linked (CpG -> gene -> protein).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from modis_dist.config.run import Simulate
from modis_dist.data.store.writer import StoreWriter
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.text import shown

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]
Omic = Literal["methylation", "expression", "protein"]

OMICS: tuple[Omic, ...] = ("methylation", "expression", "protein")
SHIFTED_FRACTION = 0.2  # of the CpGs, in every class independently
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Tables:
    """Reference tables of the simulation; methylation on the logit scale."""

    names: Mapping[Omic, tuple[str, ...]]
    mean: Mapping[Omic, Vector]  # [p]
    covariance: Mapping[Omic, Vector]  # [p, p]
    gene_methylation: Vector  # [genes], mean methylation per gene
    rho_expression: Vector  # [genes], correlation of methylation with expression
    rho_protein: Vector  # [proteins], correlation of expression with protein
    gene_of_cpg: NDArray[np.int64]  # [cpgs], position in names["expression"]
    gene_of_protein: NDArray[np.int64]  # [proteins]


def simulate(settings: Simulate, out: Path) -> None:
    """Write a paired store of ``settings.samples`` samples with labels "1".."K" at ``out``.

    Deterministic on the same kind of machine. Raises ``DataError`` for invalid ``reference`` tables and for classes
    without samples.
    """
    sizes = class_sizes(settings.samples, settings.classes)
    with threadpool_limits(1):  # rounding depends on the number of threads
        table_seed, shift_seed, order_seed, *row_seeds = np.random.SeedSequence(settings.seed).spawn(6)
        folder = settings.reference
        tables = generated(np.random.default_rng(table_seed)) if folder is None else from_folder(Path(folder))
        shifted = shifted_features(tables, settings.classes, np.random.default_rng(shift_seed))
        labels = np.random.default_rng(order_seed).permutation(np.repeat(np.arange(settings.classes), sizes))
        source = {"kind": "simulate", "settings": settings.model_dump(mode="json")}
        with StoreWriter(out, source=source) as writer:
            for omic, seed in zip(OMICS, row_seeds, strict=True):
                means = class_means(tables, omic, shifted[omic], settings.delta)
                _write_omic(writer, tables, omic, means, labels, np.random.default_rng(seed))


def class_sizes(samples: int, classes: int) -> NDArray[np.int64]:
    """Return samples per class, n/K rounded half to even, the rest in the last class. Raises ``DataError`` for none."""
    size = round(samples / classes)
    sizes = np.array([size] * (classes - 1) + [samples - size * (classes - 1)])
    if sizes.min() < 1:
        raise DataError(
            f"samples: {samples} samples in {classes} balanced classes leave one empty; use a multiple of {classes}"
        )
    return sizes


def shifted_features(tables: Tables, classes: int, rng: np.random.Generator) -> dict[Omic, Mask]:
    """Return masks of the shifted features per class, [p, K]: drawn for CpGs, derived for genes and proteins."""
    cpgs = rng.random((classes, len(tables.gene_of_cpg))).T < SHIFTED_FRACTION
    genes = np.zeros((len(tables.names["expression"]), classes), dtype=bool)
    np.logical_or.at(genes, tables.gene_of_cpg, cpgs)
    return {"methylation": cpgs, "expression": genes, "protein": genes[tables.gene_of_protein]}


def class_means(tables: Tables, omic: Omic, shifted: Mask, delta: float) -> Vector:
    """Return the mean of each class, [K, p]; correlations apply to the base mean only, and only if delta is not 0."""
    mean = tables.mean[omic]
    if omic == "expression":
        mean = _correlated(mean, tables.gene_methylation, tables.rho_expression, delta)
    elif omic == "protein":
        mean = _correlated(mean, tables.mean["expression"][tables.gene_of_protein], tables.rho_protein, delta)
    means: Vector = mean + delta * shifted.T
    return means


def _correlated(mean: Vector, upstream: Vector, rho: Vector, delta: float) -> Vector:
    if delta == 0:
        return mean
    correlated: Vector = rho * upstream + np.sqrt(1 - rho**2) * mean
    return correlated


def _write_omic(
    writer: StoreWriter, tables: Tables, omic: Omic, means: Vector, labels: NDArray[np.int64], rng: np.random.Generator
) -> None:
    factor = _factor(tables.covariance[omic])
    writer.begin(omic, tables.names[omic])
    for start in range(0, len(labels), CHUNK_ROWS):
        chunk = labels[start : start + CHUNK_ROWS]
        x = means[chunk] + rng.standard_normal((len(chunk), means.shape[1])) @ factor.T
        if omic == "methylation":
            x = 1 / (1 + np.exp(-x))
        ids = [f"subject{number + 1}" for number in range(start, start + len(chunk))]
        writer.write(
            omic,
            sample_id=ids,
            group_id=ids,
            label=[str(label + 1) for label in chunk],
            split=[""] * len(chunk),
            x=x.astype(np.float32),
        )


def _factor(covariance: Vector) -> Vector:
    """Return a matrix F with F F' = covariance."""
    values, vectors = np.linalg.eigh(covariance)
    factor: Vector = vectors * np.sqrt(np.maximum(values, 0))
    return factor


# --- tables from a folder -------------------------------------------------------------------------------------

_FILES: Mapping[Omic, tuple[str, str]] = {
    "methylation": ("mean.M", "cov.M"),
    "expression": ("mean.expr", "cov.expr"),
    "protein": ("mean.protein", "cov.protein"),
}


def from_folder(folder: Path) -> Tables:
    """Read the tables from a folder of Parquet files, named as in the R package.

    Raises ``DataError`` for missing files, names that are not aligned, and invalid values.
    """
    vectors = {omic: _vector(folder, mean) for omic, (mean, _) in _FILES.items()}
    names = {omic: vector[0] for omic, vector in vectors.items()}
    genes, proteins = names["expression"], names["protein"]
    return Tables(
        names=names,
        mean={omic: vector[1] for omic, vector in vectors.items()},
        covariance={omic: _covariance(folder, file, names[omic]) for omic, (_, file) in _FILES.items()},
        gene_methylation=_aligned(folder, "methyl.gene.level.mean", genes),
        rho_expression=_correlations(folder, "rho.methyl.expr", genes),
        rho_protein=_correlations(folder, "rho.expr.protein", proteins),
        gene_of_cpg=_map(folder, "CpG.gene.map.for.DEG", "tmp.gene", names["methylation"], genes),
        gene_of_protein=_map(folder, "protein.gene.map.for.DEP", "gene", proteins, genes),
    )


def _read(folder: Path, name: str) -> pa.Table:
    file = folder / f"{name}.parquet"
    try:
        return pq.read_table(file)
    except FileNotFoundError:
        raise DataError(f"reference {shown(str(folder))}: no file {file.name}") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"reference {shown(str(file))}: cannot be read ({shown(str(error))})") from error


def _column(table: pa.Table, column: str, where: str) -> list[str]:
    if column not in table.column_names:
        raise DataError(f"reference {where}: no column {column}")
    return [str(value) for value in table[column].to_pylist()]


def _vector(folder: Path, name: str) -> tuple[tuple[str, ...], Vector]:
    table = _read(folder, name)
    names = tuple(_column(table, "name", name))
    return names, _finite(np.array(_column(table, "value", name), dtype=np.float64), name)


def _finite(values: Vector, name: str) -> Vector:
    if not np.isfinite(values).all():
        raise DataError(f"reference {name}: values that are not finite")
    return values


def _aligned(folder: Path, name: str, expected: tuple[str, ...]) -> Vector:
    names, values = _vector(folder, name)
    if names != expected:
        raise DataError(f"reference {name}: names differ from those of the mean table, or are in another order")
    return values


def _correlations(folder: Path, name: str, expected: tuple[str, ...]) -> Vector:
    values = _aligned(folder, name, expected)
    if np.abs(values).max() > 1:
        raise DataError(f"reference {name}: correlations outside -1..1")
    return values


def _covariance(folder: Path, name: str, expected: tuple[str, ...]) -> Vector:
    table = _read(folder, name)
    if tuple(_column(table, "name", name)) != expected or tuple(table.column_names[1:]) != expected:
        raise DataError(f"reference {name}: names differ from those of the mean table, or are in another order")
    values = _finite(np.column_stack([column.to_numpy() for column in table.columns[1:]]), name)
    smallest, *_, largest = np.linalg.eigvalsh(values)
    if not np.allclose(values, values.T) or smallest < -1e-6 * abs(largest):
        raise DataError(f"reference {name}: not a covariance matrix (symmetric, without negative eigenvalues)")
    return values


def _map(folder: Path, name: str, column: str, rows: tuple[str, ...], genes: tuple[str, ...]) -> NDArray[np.int64]:
    """Return the gene of each row, joined by row name; the spelling of the other name columns varies."""
    table = _read(folder, name)
    gene_of = dict(zip(_column(table, "rowname", name), _column(table, column, name), strict=True))
    position = {gene: number for number, gene in enumerate(genes)}
    unknown = [row for row in rows if gene_of.get(row) not in position]
    if unknown:
        raise DataError(
            f"reference {name}: {shown(unknown[0])!r} has no gene in the expression table ({len(unknown)} such rows)"
        )
    return np.array([position[gene_of[row]] for row in rows])


# --- generated tables -----------------------------------------------------------------------------------------

# Number of features, mean and standard deviation of the means, and eigenvalues by rank (fraction of p -> value,
# log-linear in between): a few strong directions and many weak ones, as in tumour data.
_SHAPES: Mapping[Omic, tuple[int, float, float, tuple[tuple[float, float], ...]]] = {
    "methylation": (367, -2.0, 2.0, ((0, 80.0), (0.01, 8.0), (0.05, 1.5), (0.3, 0.15), (0.8, 0.006), (1, 5e-5))),
    "expression": (131, -0.25, 1.05, ((0, 6.5), (0.08, 2.0), (0.3, 0.5), (0.9, 0.04), (1, 0.02))),
    "protein": (160, 0.03, 0.08, ((0, 7.5), (0.06, 1.2), (0.25, 0.2), (0.75, 0.015), (1, 0.002))),
}
_MAX_CPGS, _MAX_PROTEINS = 19, 3  # of one gene


def generated(rng: np.random.Generator) -> Tables:
    """Draw tables with the shapes and structure of the originals, without measured data."""
    counts = {omic: shape[0] for omic, shape in _SHAPES.items()}
    mean = {omic: shape[1] + shape[2] * rng.standard_normal(shape[0]) for omic, shape in _SHAPES.items()}
    covariance = {omic: _random_covariance(shape[0], shape[3], rng) for omic, shape in _SHAPES.items()}
    genes = counts["expression"]
    gene_of_cpg = _random_map(counts["methylation"], genes, _MAX_CPGS, rng)
    prefix = {"methylation": "cpg", "expression": "gene", "protein": "protein"}
    return Tables(
        names={omic: tuple(f"{prefix[omic]}{number + 1}" for number in range(counts[omic])) for omic in OMICS},
        mean=mean,
        covariance=covariance,
        gene_methylation=np.bincount(gene_of_cpg, mean["methylation"]) / np.bincount(gene_of_cpg),
        rho_expression=rng.triangular(-0.9, -0.05, 0.25, genes),
        rho_protein=rng.triangular(-0.2, 0.3, 0.8, counts["protein"]),
        gene_of_cpg=gene_of_cpg,
        gene_of_protein=_random_map(counts["protein"], genes, _MAX_PROTEINS, rng),
    )


def _random_covariance(size: int, spectrum: tuple[tuple[float, float], ...], rng: np.random.Generator) -> Vector:
    """Return a positive definite matrix with the given eigenvalues and uniformly random directions."""
    ranks, values = np.array(spectrum).T
    eigenvalues = np.exp(np.interp(np.linspace(0, 1, size), ranks, np.log(values)))
    directions, _ = np.linalg.qr(rng.standard_normal((size, size)))
    covariance: Vector = (directions * eigenvalues) @ directions.T
    return (covariance + covariance.T) / 2


def _random_map(size: int, genes: int, max_per_gene: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Assign a gene to each of ``size`` features: every gene gets one to ``max_per_gene``, few genes get many."""
    weights = rng.pareto(1.0, genes)
    counts = np.ones(genes, dtype=np.int64)
    while counts.sum() < size:
        open_weights = np.where(counts < max_per_gene, weights, 0)
        counts[rng.choice(genes, p=open_weights / open_weights.sum())] += 1
    return rng.permutation(np.repeat(np.arange(genes), counts))
