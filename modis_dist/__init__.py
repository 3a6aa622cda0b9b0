"""MODIS: distributed training of multi-omics integration models on small, unpaired, partially labelled data.

``modis_dist.load(folder)`` opens a trained model; use the ``modis-dist`` command or the subpackages for the rest.
``import modis_dist`` does not import torch, ray or mlflow.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from modis_dist.runtime.version import __version__

if TYPE_CHECKING:
    from modis_dist.evaluate.predictor import Predictor

__all__ = ["__version__", "load"]


def load(folder: str | Path, *, device: str = "cpu") -> "Predictor":
    """Open the best model of a run or study for prediction.

    Raises ``DataError`` if the folder has no valid checkpoint.
    """
    from modis_dist.evaluate.predictor import Predictor

    return Predictor.open(Path(folder), device=device)
