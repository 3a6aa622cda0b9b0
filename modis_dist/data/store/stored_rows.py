"""The features of a store as a matrix that is never in memory as a whole."""

from typing import Any

import numpy as np

from modis_dist.data.store.index import Features
from modis_dist.data.store.reader import Store


class StoredRows:
    """Rows of one modality of a store, read where they are asked for.

    The row group that was read last is kept, so that who asks for rows in ascending order has each read once.
    """

    def __init__(self, store: Store, modality: str) -> None:
        self._store = store
        self._modality = modality
        self._edges = store.edges(modality)
        self._held: tuple[int, Features] | None = None  # number of a row group, and its rows
        self.shape = (store.rows(modality), len(store.features(modality)))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Features:
        """Features [n, p] of a slice of the rows, or of positions. Raises what ``Store.read`` raises."""
        wanted = np.arange(len(self))[rows]
        x = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        group = np.searchsorted(self._edges, wanted, side="right") - 1
        for number in np.unique(group):
            here = group == number
            x[here] = self._row_group(int(number))[wanted[here] - self._edges[number]]
        return x

    def _row_group(self, number: int) -> Features:
        if self._held is None or self._held[0] != number:
            self._held = None  # never two of them in memory
            rows = np.arange(self._edges[number], self._edges[number + 1])
            self._held = number, self._store.read(self._modality, rows)
        return self._held[1]
