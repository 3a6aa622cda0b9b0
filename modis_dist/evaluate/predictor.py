"""Using a trained model: class, embedding and translation of new rows. Prediction uses mu, never a sample.

``Predictor`` reads only safetensors and JSON. Frames hold one modality: features as columns, by name and in any order,
an optional ``sample_id`` column; other columns named like metadata are ignored.
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
    """A trained model of one replicate and the preprocessing fitted with it."""

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
        self.data = data  # ``data_key`` of what it learnt from

    @classmethod
    def open(cls, folder: Path, *, device: str | torch.device = "cpu") -> "Predictor":
        """The best model of a run's output folder, a sweep's, or a checkpoint itself.

        Only reads, so the folder may be read-only. Raises ``DataError`` where there is none or it is damaged.
        """
        path = _find(folder)
        held = checkpoint.load(path)
        try:
            shape = Shape(**{k: _tuples(v) for k, v in held.state["shape"].items()})
            pipelines = {m: _pipeline(m, held) for m in shape.features}
            model = Modis(shape, dtype=next(iter(held.tensors["model"].values())).dtype)
            model.load_state_dict(dict(held.tensors["model"]))
            classes = tuple(held.state["classes"])
            known = {name: str(held.state[name]) for name in ("trial", "data")}
        except (KeyError, TypeError, RuntimeError) as error:
            raise DataError(f"{path}: is not a model of this program ({shown(str(error))})") from None
        return cls(model.to(device), pipelines, classes, path=path, **known)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities the model knows."""
        return self._model.modalities

    @property
    def shape(self) -> Shape:
        """Sizes of the networks."""
        return self._model.shape

    def features(self, modality: str) -> tuple[str, ...]:
        """Names of the features a modality is made of, before preprocessing. Raises ``DataError`` if unknown."""
        return self._pipeline_of(modality).features_in

    # --- frames -----------------------------------------------------------------------------------------------

    def predict(self, frame: "pd.DataFrame", *, modality: str) -> "pd.DataFrame":
        """Columns ``sample_id`` (if given), ``predicted``, ``probability`` and ``p(<class>)`` for every class."""
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
        """Latent means mu, columns ``z0`` .. ``z<L-1>``, and ``sample_id`` if given."""
        import pandas as pd

        mu, _ = self.encode(self._matrix(frame, modality), modality=modality)
        names = [f"z{i}" for i in range(mu.shape[1])]
        return _with_ids(frame, pd.DataFrame(mu, index=frame.index, columns=names))

    def translate(self, frame: "pd.DataFrame", *, source: str, target: str) -> "pd.DataFrame":
        """Features of modality ``target`` decoded from rows of ``source``, in the units of the data."""
        import pandas as pd

        mu, _ = self.encode(self._matrix(frame, source), modality=source)
        pipeline = self._pipeline_of(target)
        values = pipeline.inverse(self.decode(mu, modality=target))
        return _with_ids(frame, pd.DataFrame(values, index=frame.index, columns=list(pipeline.features_in)))

    # --- arrays -----------------------------------------------------------------------------------------------

    def transform(self, x: Matrix, *, modality: str, storage: FeatureStorage = "memory") -> Features:
        """Raw features [n, p] preprocessed as in training, and kept in a place."""
        return self._pipeline_of(modality).apply(x, storage=storage)

    def probabilities(self, x: Features, *, modality: str) -> NDArray[np.float32]:
        """Class probabilities [n, K] of raw features [n, p]."""
        mu, _ = self.encode(x, modality=modality)
        return self.classify(mu)

    def encode(self, x: Features, *, modality: str) -> tuple[Features, Features]:
        """mu and logvar, both [n, L], of raw features [n, p]."""
        return self.encode_prepared(self.transform(x, modality=modality), modality=modality)

    @torch.inference_mode()
    def encode_prepared(self, x: Features, *, modality: str) -> tuple[Features, Features]:
        """mu and logvar of rows that are already preprocessed."""
        vae = self._model.vae(modality)
        parts = [vae.encode(rows) for rows in self._chunks(x)]
        if not parts:
            empty = np.empty((0, self._model.shape.latent), np.float32)
            return empty, empty
        mu, logvar = (torch.cat(part, 1)[0].cpu().numpy() for part in zip(*parts, strict=True))
        return mu, logvar

    @torch.inference_mode()
    def classify(self, z: Features) -> NDArray[np.float32]:
        """Class probabilities [n, K] of latents [n, L]."""
        parts = [self._model.discriminator(rows).label.softmax(-1)[0].cpu() for rows in self._chunks(z)]
        return torch.cat(parts).numpy() if parts else np.empty((0, len(self.classes)), np.float32)

    @torch.inference_mode()
    def decode(self, z: Features, *, modality: str, like: Features | None = None) -> Features:
        """Preprocessed features [n, p] decoded from latents [n, L].

        Of counts, for rows with the library sizes of ``like`` [n, p], or without it with the typical one in training.
        """
        vae, width = self._model.vae(modality), self._model.shape.features[modality]
        library: Iterable[torch.Tensor | None] = repeat(None)
        if vae.counts and like is not None:
            library = map(vae.library_of, self._chunks(like, width=width))
        chunks = zip(self._chunks(z, width=width), library, strict=False)
        parts = [vae.reconstruct(rows, of_rows)[0].cpu() for rows, of_rows in chunks]
        return torch.cat(parts).numpy() if parts else np.empty((0, width), np.float32)

    def _chunks(self, x: Features, *, width: int | None = None) -> Iterator[torch.Tensor]:
        dtype = next(self._model.parameters()).dtype
        rows = rows_at_once(width or x.shape[1], most=ROWS_AT_ONCE)
        for start in range(0, len(x), rows):
            yield torch.as_tensor(x[start : start + rows]).to(self._device, dtype).unsqueeze(0)

    def _pipeline_of(self, modality: str) -> Pipeline:
        if modality not in self._pipelines:
            hint = nearest(modality, list(self.modalities)) or "; it has " + ", ".join(self.modalities)
            raise DataError(f"{self.path}: the model has no modality {shown(modality)!r}{hint}")
        return self._pipelines[modality]

    def _matrix(self, frame: "pd.DataFrame", modality: str) -> Features:
        """The model's features of a frame, by name. Raises ``DataError`` naming the columns that are missing."""
        import pandas as pd

        wanted = self.features(modality)
        if not isinstance(frame, pd.DataFrame):
            raise DataError(f"modality {modality}: a pandas DataFrame is needed (got {type(frame).__name__})")
        twice = frame.columns[frame.columns.duplicated()].intersection(list(wanted))
        if len(twice):
            raise DataError(f"modality {modality}: column {shown(str(twice[0]))} stands there twice; remove one")
        missing = [name for name in wanted if name not in frame.columns]
        if missing:
            some = ", ".join(shown(name) for name in missing[:5])
            raise DataError(f"modality {modality}: {len(missing)} of {len(wanted)} features are missing ({some})")
        try:
            with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite and is refused by name
                return np.ascontiguousarray(frame[list(wanted)].to_numpy(dtype=np.float64).astype(np.float32))
        except (TypeError, ValueError) as error:
            raise DataError(f"modality {modality}: features must be numbers ({shown(str(error))})") from None


def _find(folder: Path) -> Path:
    """The checkpoint that a path stands for."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    if checkpoint.NAME.match(folder.name):
        return folder
    for place in (folder / "best", folder / "model" / "best", folder):
        found = checkpoint.latest(place) if place.is_dir() else None
        if found is not None:
            return found
    raise DataError(f"{folder}: no trained model (expected best/step-*)")


def _pipeline(modality: str, held: checkpoint.Checkpoint) -> Pipeline:
    prefix = f"{modality}/"
    arrays = {
        name.removeprefix(prefix): tensor.numpy()
        for name, tensor in held.tensors.get("preprocess", {}).items()
        if name.startswith(prefix)
    }
    return Pipeline.from_arrays(arrays, held.state["preprocess"][modality])


def _tuples(value: Any) -> Any:
    """Lists of JSON back to the tuples of ``Shape``."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _with_ids(frame: "pd.DataFrame", result: "pd.DataFrame") -> "pd.DataFrame":
    if "sample_id" in frame.columns:
        result.insert(0, "sample_id", frame["sample_id"])
    return result
