"""The features of a store as a matrix that is read row group by row group."""

from typing import Any

import numpy as np

from modis_dist.data.store.index import Features
from modis_dist.data.store.reader import Store


class StoredRows:
    """Features of one modality, read on access.

    The last row group is cached, so that ascending access reads every row group once.
    """

    def __init__(self, store: Store, modality: str) -> None:
        self._store = store
        self._modality = modality
        self._edges = store.edges(modality)
        self._cached: tuple[int, Features] | None = None  # number and features of a row group
        self.shape = (store.rows(modality), len(store.features(modality)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Features:
        """Return the features [n, p] of a slice or of positions. Raises as ``Store.read``."""
        positions = np.arange(len(self))[rows]
        x = np.empty((len(positions), self.shape[1]), dtype=np.float32)
        group = np.searchsorted(self._edges, positions, side="right") - 1
        for number in np.unique(group):
            in_group = group == number
            x[in_group] = self._row_group(int(number))[positions[in_group] - self._edges[number]]
        return x

    def _row_group(self, number: int) -> Features:
        if self._cached is None or self._cached[0] != number:
            self._cached = None  # frees memory before the next read
            rows = np.arange(self._edges[number], self._edges[number + 1])
            self._cached = number, self._store.read(self._modality, rows)
        return self._cached[1]
