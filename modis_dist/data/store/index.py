"""What is known of the rows of one modality besides their features."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Strings = NDArray[np.object_]
Rows = NDArray[np.int64]
Features = NDArray[np.float32]
UNLABELLED = -1


@dataclass(frozen=True)
class Index:
    """Row metadata of one modality; all arrays have shape [n] and the order of the rows in the store."""

    sample_id: Strings
    group_id: Strings  # the patient; equals sample_id where the source has none
    label: Rows  # code into the store's classes, UNLABELLED (-1) where unknown
    split: Strings  # "train", "test" or "" where the source has none

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, rows: Any) -> "Index":
        """The same metadata for some rows (integer positions or a mask)."""
        return Index(self.sample_id[rows], self.group_id[rows], self.label[rows], self.split[rows])
