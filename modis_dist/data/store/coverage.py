"""Summary and verification of a store, row group by row group.

The summary has counts per class, modality and split, pairing, and value ranges.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modis_dist.data.store.index import Index
from modis_dist.data.store.reader import Store
from modis_dist.data.store.rules import Ledger, check_features, check_finite
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.text import shown

Progress = Callable[[str, int, int], None]  # modality, done, total (in rows or bytes)


@dataclass(frozen=True)
class ModalityCoverage:
    """Counts and ranges of one modality."""

    rows: int
    features: int
    groups: int
    by_class: dict[str, int]  # every class of the store, including those without rows
    unlabelled: int
    by_split: dict[str, int]  # train, test, none
    minimum: float | None  # None if every value is missing
    maximum: float | None
    mean: float | None
    missing: int
    constant_features: int  # features with at most one distinct value

    @property
    def labelled_fraction(self) -> float:
        """Fraction of rows with a label."""
        return 1 - self.unlabelled / self.rows

    @property
    def missing_fraction(self) -> float:
        """Fraction of values that are missing."""
        return self.missing / (self.rows * self.features)


@dataclass(frozen=True)
class Coverage:
    """Counts and ranges of a store."""

    fingerprint: str
    classes: tuple[str, ...]
    modalities: dict[str, ModalityCoverage]
    samples: int
    by_modality_count: dict[int, int]  # number of modalities -> number of samples with rows in that many
    notices: tuple[str, ...]

    @property
    def empty_pairs(self) -> list[tuple[str, str]]:
        """(class, modality) pairs without a labelled row, where another modality has rows of the class."""
        return [(c, m) for m, counts in self.modalities.items() for c in self.classes if not counts.by_class[c]]

    def as_tree(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        tree = asdict(self)
        for name, modality in self.modalities.items():
            tree["modalities"][name] |= {
                "labelled_fraction": modality.labelled_fraction,
                "missing_fraction": modality.missing_fraction,
            }
        return tree | {"empty_pairs": [{"label": c, "modality": m} for c, m in self.empty_pairs]}


def measure(store: Store, *, progress: Progress) -> Coverage:
    """Summarise a store. Raises ``DataError`` if a shard cannot be read."""
    counted: Counter[str] = Counter()
    modalities: dict[str, ModalityCoverage] = {}
    for name in store.modalities:
        index, ranges = store.index(name), _Ranges(len(store.features(name)))
        counted.update(index.sample_id)
        for _, x in store.batches(name):
            ranges.add(x)
            progress(name, ranges.rows, store.rows(name))
        modalities[name] = _modality(store, name, index, ranges)
    by_count = dict(sorted(Counter(counted.values()).items()))
    return Coverage(store.fingerprint, store.classes, modalities, len(counted), by_count, store.notices)


def verify(path: Path, *, progress: Progress) -> Store:
    """Verify all of a store, ignoring earlier verifications, and return it.

    Raises ``DataError`` for the first problem: a missing or modified shard, a wrong page checksum, an infinite value,
    or invalid names, ids, labels, groups or splits.
    """
    store = Store.open(path, cached=False)
    ledger = Ledger()
    for name in store.modalities:
        check_features(store.features(name), name)
        for index, x in store.batches(name):
            where = f"{shown(str(path))}, {name}"
            check_finite(x, index.sample_id.tolist(), store.features(name), where, first_row=ledger.rows(name) + 1)
            labels = [store.classes[code] if code >= 0 else None for code in index.label]
            ledger.add(
                name,
                sample_id=index.sample_id.tolist(),
                group_id=index.group_id.tolist(),
                label=labels,
                split=index.split.tolist(),
            )
            progress(name, ledger.rows(name), store.rows(name))
    if unused := set(store.classes) - ledger.labels:
        raise DataError(
            f"{shown(str(path))}: class {shown(min(unused))!r} of the manifest has no row; repeat the import"
        )
    return store


def _modality(store: Store, name: str, index: Index, ranges: "_Ranges") -> ModalityCoverage:
    by_code = np.bincount(index.label + 1, minlength=len(store.classes) + 1).tolist()
    splits = Counter(index.split)
    return ModalityCoverage(
        rows=len(index),
        features=len(store.features(name)),
        groups=len(set(index.group_id)),
        by_class=dict(zip(store.classes, by_code[1:], strict=True)),
        unlabelled=by_code[0],
        by_split={"train": splits["train"], "test": splits["test"], "none": splits[""]},
        missing=ranges.missing,
        **ranges.summary(),
    )


class _Ranges:
    """Running minimum, maximum, mean and missing count."""

    def __init__(self, features: int) -> None:
        self.rows = 0
        self.missing = 0
        self._sum = 0.0
        self._minimum = np.full(features, np.inf, dtype=np.float32)
        self._maximum = np.full(features, -np.inf, dtype=np.float32)

    def add(self, x: NDArray[np.float32]) -> None:
        """Add rows [n, p]."""
        self.rows += len(x)
        self.missing += int(np.isnan(x).sum())
        self._sum += float(np.nansum(x, dtype=np.float64))
        np.fmin(self._minimum, np.fmin.reduce(x, axis=0), out=self._minimum)
        np.fmax(self._maximum, np.fmax.reduce(x, axis=0), out=self._maximum)

    def summary(self) -> dict[str, Any]:
        present = self.rows * len(self._minimum) - self.missing
        constant = int((self._maximum <= self._minimum).sum())
        if not present:
            return {"minimum": None, "maximum": None, "mean": None, "constant_features": constant}
        low, high = float(self._minimum.min()), float(self._maximum.max())
        return {"minimum": low, "maximum": high, "mean": self._sum / present, "constant_features": constant}
