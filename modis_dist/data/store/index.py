"""Row metadata of one modality, and array types of the data layer."""

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
    """Row metadata of one modality: arrays of shape [n] in the order of the rows in the store."""

    sample_id: Strings
    group_id: Strings  # the patient; sample_id if the source has no groups
    label: Rows  # code of the class in the store, UNLABELLED (-1) if unknown
    split: Strings  # "train", "test" or "" (not given)

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, rows: Any) -> "Index":
        """Return the metadata of some rows (integer positions or a mask)."""
        return Index(self.sample_id[rows], self.group_id[rows], self.label[rows], self.split[rows])
