"""MODIS on clusters: multi-omics integration for small, unpaired, half-labelled data.

``modis_dist.load(folder)`` opens a trained model; everything else is reached through the
``modis-dist`` command or the submodules. Importing the package imports neither torch, ray nor mlflow.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from modis_dist.runtime.version import __version__

if TYPE_CHECKING:
    from modis_dist.evaluate.predictor import Predictor

__all__ = ["__version__", "load"]


def load(folder: str | Path, *, device: str = "cpu") -> "Predictor":
    """Open the best model of a finished run for prediction.

    Raises ``DataError`` where the folder holds no valid checkpoint.
    """
    from modis_dist.evaluate.predictor import Predictor

    return Predictor.open(Path(folder), device=device)
