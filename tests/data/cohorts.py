"""Random cohorts: patients with samples of several classes in several modalities, rows in any order."""

from collections.abc import Mapping, Sequence

import numpy as np

from modis_dist.data.store.index import Index

Row = tuple[str, str, int]  # sample, group, label


def index_of(rows: Sequence[Row], split: Sequence[str] | None = None) -> Index:
    """Return an index with these rows, in this order."""
    samples, groups, labels = ([row[part] for row in rows] for part in range(3))
    stored = np.array(split if split is not None else [""] * len(rows), dtype=object)
    return Index(
        np.array(samples, dtype=object), np.array(groups, dtype=object), np.array(labels, dtype=np.int64), stored
    )


def random_cohort(
    seed: int, *, groups: int, classes: int, modalities: int, samples_per_group: int, unlabelled: float
) -> dict[str, Index]:
    """Return groups with a main class and 1..samples_per_group samples, and samples with rows in some modalities."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Row]] = {f"m{number}": [] for number in range(modalities)}
    for group, main in enumerate(rng.integers(classes, size=groups)):
        for sample in range(rng.integers(1, samples_per_group + 1)):
            label = int(main if rng.random() < 0.8 else rng.integers(classes))
            measured = rng.random(modalities) < 0.7
            measured[rng.integers(modalities)] = True
            for number in np.flatnonzero(measured):
                seen = -1 if rng.random() < unlabelled else label
                rows[f"m{number}"].append((f"s{group}-{sample}", f"g{group}", seen))
    return {
        name: index_of([rows_of_modality[i] for i in rng.permutation(len(rows_of_modality))])
        for name, rows_of_modality in rows.items()
    }


def reordered(indexes: Mapping[str, Index], seed: int) -> dict[str, Index]:
    """Return the same rows and modalities in another order."""
    rng = np.random.default_rng(seed)
    return {name: indexes[name].take(rng.permutation(len(indexes[name]))) for name in reversed(list(indexes))}
