"""A trained model applied to new rows: class, embedding and translation, all from mu, never from sampled z.

``Predictor`` reads only safetensors and JSON. A frame has the rows of one modality: features as columns by name, in any
order, and an optional ``sample_id`` column; other columns are ignored.
"""

from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from modis_dist.data.preprocess import Pipeline
from modis_dist.data.store.arrays import FeatureStorage, Matrix
from modis_dist.data.store.index import Features
from modis_dist.model.networks import Modis, Shape
from modis_dist.runtime.errors import DataError, nearest
from modis_dist.runtime.text import shown
from modis_dist.train import checkpoint
from modis_dist.train.placement import rows_at_once

if TYPE_CHECKING:
    import pandas as pd

ROWS_AT_ONCE = 4096


class Predictor:
    """A trained model and the preprocessing fitted with it."""

    def __init__(
        self,
        model: Modis,
        pipelines: dict[str, Pipeline],
        classes: tuple[str, ...],
        *,
        path: Path,
        trial: str,
        data: str,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._pipelines = pipelines
        self._device = next(model.parameters()).device
        self.classes = classes
        self.path = path
        self.trial = trial  # hash of the settings and data it was trained with
        self.data = data  # ``data_key`` of its training data

    @classmethod
    def open(cls, folder: Path, *, device: str | torch.device = "cpu") -> "Predictor":
        """Load the best model of a run or a study, or a checkpoint itself, from a folder that may be read-only.

        Raises ``DataError`` if there is no model or it is damaged.
        """
        path = _find(folder)
        loaded = checkpoint.load(path)
        try:
            shape = Shape(**{k: _tuples(v) for k, v in loaded.state["shape"].items()})
            pipelines = {m: _pipeline(m, loaded) for m in shape.features}
            model = Modis(shape, dtype=next(iter(loaded.tensors["model"].values())).dtype)
            model.load_state_dict(dict(loaded.tensors["model"]))
            classes = tuple(loaded.state["classes"])
            known = {name: str(loaded.state[name]) for name in ("trial", "data")}
        except (KeyError, TypeError, RuntimeError) as error:
            raise DataError(f"{path}: is not a MODIS model ({shown(str(error))})") from None
        return cls(model.to(device), pipelines, classes, path=path, **known)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Return the modalities of the model."""
        return self._model.modalities

    @property
    def shape(self) -> Shape:
        """Return the sizes of the networks."""
        return self._model.shape

    def features(self, modality: str) -> tuple[str, ...]:
        """Return the feature names of a modality before preprocessing. Raises ``DataError`` for an unknown modality."""
        return self._pipeline_of(modality).features_in

    # --- frames -----------------------------------------------------------------------------------------------

    def predict(self, frame: "pd.DataFrame", *, modality: str) -> "pd.DataFrame":
        """Return columns ``sample_id`` (if given), ``predicted``, ``probability`` and ``p(<class>)`` of every class."""
        import pandas as pd

        probability = self.probabilities(self._matrix(frame, modality), modality=modality)
        top = probability.argmax(1)
        columns: dict[str, Any] = {
            "predicted": np.array(self.classes, dtype=object)[top],
            "probability": probability[np.arange(len(top)), top],
        }
        columns |= {f"p({label})": probability[:, k] for k, label in enumerate(self.classes)}
        return _with_ids(frame, pd.DataFrame(columns, index=frame.index))

    def embed(self, frame: "pd.DataFrame", *, modality: str) -> "pd.DataFrame":
        """Return latent means mu in columns ``z0`` .. ``z<L-1>``, and ``sample_id`` if given."""
        import pandas as pd

        mu, _ = self.encode(self._matrix(frame, modality), modality=modality)
        names = [f"z{i}" for i in range(mu.shape[1])]
        return _with_ids(frame, pd.DataFrame(mu, index=frame.index, columns=names))

    def translate(self, frame: "pd.DataFrame", *, source: str, target: str) -> "pd.DataFrame":
        """Return rows of ``source`` decoded as modality ``target``, in the units of the data."""
        import pandas as pd

        mu, _ = self.encode(self._matrix(frame, source), modality=source)
        pipeline = self._pipeline_of(target)
        values = pipeline.inverse(self.decode(mu, modality=target))
        return _with_ids(frame, pd.DataFrame(values, index=frame.index, columns=list(pipeline.features_in)))

    # --- arrays -----------------------------------------------------------------------------------------------

    def transform(self, x: Matrix, *, modality: str, storage: FeatureStorage = "memory") -> Features:
        """Return raw features [n, p] preprocessed as in training, stored in ``storage``."""
        return self._pipeline_of(modality).apply(x, storage=storage)

    def probabilities(self, x: Features, *, modality: str) -> NDArray[np.float32]:
        """Return class probabilities [n, K] of raw features [n, p]."""
        mu, _ = self.encode(x, modality=modality)
        return self.classify(mu)

    def encode(self, x: Features, *, modality: str) -> tuple[Features, Features]:
        """Return mu and logvar, both [n, L], of raw features [n, p]."""
        return self.encode_prepared(self.transform(x, modality=modality), modality=modality)

    @torch.inference_mode()
    def encode_prepared(self, x: Features, *, modality: str) -> tuple[Features, Features]:
        """Return mu and logvar of preprocessed rows."""
        vae = self._model.vae(modality)
        parts = [vae.encode(rows) for rows in self._chunks(x)]
        if not parts:
            empty = np.empty((0, self._model.shape.latent), np.float32)
            return empty, empty
        mu, logvar = (torch.cat(part, 1)[0].cpu().numpy() for part in zip(*parts, strict=True))
        return mu, logvar

    @torch.inference_mode()
    def classify(self, z: Features) -> NDArray[np.float32]:
        """Return class probabilities [n, K] of latent vectors [n, L]."""
        parts = [self._model.discriminator(rows).label.softmax(-1)[0].cpu() for rows in self._chunks(z)]
        return torch.cat(parts).numpy() if parts else np.empty((0, len(self.classes)), np.float32)

    @torch.inference_mode()
    def decode(self, z: Features, *, modality: str, like: Features | None = None) -> Features:
        """Return preprocessed features [n, p] decoded from latents [n, L].

        Counts are decoded with the library sizes of ``like`` [n, p]; without it, with the typical size in training.
        """
        vae, width = self._model.vae(modality), self._model.shape.features[modality]
        library_sizes: Iterable[torch.Tensor | None] = repeat(None)
        if vae.counts and like is not None:
            library_sizes = map(vae.library_of, self._chunks(like, width=width))
        chunks = zip(self._chunks(z, width=width), library_sizes, strict=False)
        parts = [vae.reconstruct(rows, library)[0].cpu() for rows, library in chunks]
        return torch.cat(parts).numpy() if parts else np.empty((0, width), np.float32)

    def _chunks(self, x: Features, *, width: int | None = None) -> Iterator[torch.Tensor]:
        dtype = next(self._model.parameters()).dtype
        rows = rows_at_once(width or x.shape[1], max_rows=ROWS_AT_ONCE)
        for start in range(0, len(x), rows):
            yield torch.as_tensor(x[start : start + rows]).to(self._device, dtype).unsqueeze(0)

    def _pipeline_of(self, modality: str) -> Pipeline:
        if modality not in self._pipelines:
            hint = nearest(modality, list(self.modalities)) or "; it has " + ", ".join(self.modalities)
            raise DataError(f"{self.path}: the model has no modality {shown(modality)!r}{hint}")
        return self._pipelines[modality]

    def _matrix(self, frame: "pd.DataFrame", modality: str) -> Features:
        """Return the features of the model from a frame. Raises ``DataError`` with the names of missing columns."""
        import pandas as pd

        names = self.features(modality)
        if not isinstance(frame, pd.DataFrame):
            raise DataError(f"modality {modality}: expected a pandas DataFrame, got {type(frame).__name__}")
        duplicated = frame.columns[frame.columns.duplicated()].intersection(list(names))
        if len(duplicated):
            raise DataError(f"modality {modality}: duplicate column {shown(str(duplicated[0]))}; remove one")
        missing = [name for name in names if name not in frame.columns]
        if missing:
            some = ", ".join(shown(name) for name in missing[:5])
            raise DataError(f"modality {modality}: {len(missing)} of {len(names)} features are missing ({some})")
        try:
            with np.errstate(over="ignore"):  # values beyond float32 become infinite and raise later, by name
                return np.ascontiguousarray(frame[list(names)].to_numpy(dtype=np.float64).astype(np.float32))
        except (TypeError, ValueError) as error:
            raise DataError(f"modality {modality}: features must be numbers ({shown(str(error))})") from None


def _find(folder: Path) -> Path:
    """Return the checkpoint in a folder."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if checkpoint.NAME.match(folder.name):
        return folder
    for parent in (folder / "best", folder / "model" / "best", folder):
        latest = checkpoint.latest(parent) if parent.is_dir() else None
        if latest is not None:
            return latest
    raise DataError(f"{folder}: no trained model (expected best/step-*)")


def _pipeline(modality: str, loaded: checkpoint.Checkpoint) -> Pipeline:
    prefix = f"{modality}/"
    arrays = {
        name.removeprefix(prefix): tensor.numpy()
        for name, tensor in loaded.tensors.get("preprocess", {}).items()
        if name.startswith(prefix)
    }
    return Pipeline.from_arrays(arrays, loaded.state["preprocess"][modality])


def _tuples(value: Any) -> Any:
    """Convert the lists of JSON to the tuples of ``Shape``."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _with_ids(frame: "pd.DataFrame", result: "pd.DataFrame") -> "pd.DataFrame":
    if "sample_id" in frame.columns:
        result.insert(0, "sample_id", frame["sample_id"])
    return result
