"""A finished model in MLflow's own format, so that any MLflow tool can load and serve it.

Nothing is pickled and no code is copied: the format names this module, and ``_load_pyfunc`` opens the run's own files
(safetensors, JSON, YAML) with the installed package. Loading needs ``modis_dist`` in the environment::

    model = mlflow.pyfunc.load_model("models:/<id>")
    model.predict(frame)                                  # the run's first modality
    model.predict(frame, params={"modality": "mirna"})    # any other

``frame`` has the features of that modality as columns (float64 or float32) and, where wanted, ``sample_id``. The
signature lists the features of every modality as optional columns, since a call holds those of one; a feature that the
modality needs and the frame lacks is a ``DataError``.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import modis_dist
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import text as mlflow_text
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.text import shown

if TYPE_CHECKING:
    import pandas as pd

    from modis_dist.evaluate.predictor import Predictor

# Only what prediction needs: a run's folder may also hold predictions with sample ids.
PARTS = ("best", "run.yaml")


class PyfuncModel:
    """What ``mlflow.pyfunc.load_model`` wraps."""

    def __init__(self, predictor: "Predictor") -> None:
        self._predictor = predictor

    def predict(self, model_input: "pd.DataFrame", params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Class, probability and the probability of each class, one row per row of the input."""
        modality = (params or {}).get("modality", self._predictor.modalities[0])
        return self._predictor.predict(model_input, modality=modality)


def _load_pyfunc(path: str) -> PyfuncModel:
    """MLflow calls this with the folder that ``save`` stored."""
    return PyfuncModel(modis_dist.load(path))


def example(predictor: "Predictor", modality: str) -> "pd.DataFrame":
    """A row that shows the columns of a modality; its zeros are nobody's data."""
    import pandas as pd

    zeros = pd.DataFrame(0.0, index=[0], columns=list(predictor.features(modality)))
    zeros.insert(0, "sample_id", "example")
    return zeros


def save(model_folder: Path, destination: Path, *, example: "pd.DataFrame", modality: str) -> None:
    """Write the model of a finished run as an MLflow model folder; ``destination`` must not be there yet.

    ``modality`` is the one that a call without ``params`` means, and the one of ``example``. Raises ``DataError``
    where the run's folder lacks its model.
    """
    mlflow_store.prepare()
    from mlflow.models import Model

    _save(model_folder, destination, example=example, modality=modality, identity=Model())


def log(client: Any, *, model_folder: Path, experiment_id: str, run_id: str, name: str) -> str:
    """Save a model as an output of a run; returns MLflow's id of the model."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    predictor = modis_dist.load(model_folder)
    modality = predictor.modalities[0]
    record = client.create_logged_model(
        experiment_id,
        name=_model_name(name),
        source_run_id=run_id,
        model_type="classifier",
        tags={"mlflow.note.content": _note(predictor)},
    )
    try:
        identity = Model(
            artifact_path=record.artifact_location, run_id=run_id, model_uuid=record.model_id, model_id=record.model_id
        )
        with TemporaryDirectory() as folder:
            saved = Path(folder, "model")
            _save(model_folder, saved, example=example(predictor, modality), modality=modality, identity=identity)
            client.log_model_artifacts(record.model_id, str(saved))
        client.log_outputs(run_id, [LoggedModelOutput(record.model_id, step=0)])
    except BaseException:
        client.finalize_logged_model(record.model_id, "FAILED")
        raise
    client.finalize_logged_model(record.model_id, "READY")
    return str(record.model_id)


def digest(model_folder: Path) -> str:
    """SHA-256 over the names and bytes of the files that make up a model."""
    total = hashlib.sha256()
    for path in _files(model_folder):
        total.update(f"{path.relative_to(model_folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _save(model_folder: Path, destination: Path, *, example: "pd.DataFrame", modality: str, identity: Any) -> None:
    import mlflow.pyfunc

    with TemporaryDirectory() as folder:
        copy = Path(folder, "modis")
        for path in _files(model_folder):
            target = copy / path.relative_to(model_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        predictor = modis_dist.load(copy)  # what is stored must open by itself
        mlflow.pyfunc.save_model(
            destination,
            loader_module=__name__,
            data_path=str(copy),
            mlflow_model=identity,
            signature=_signature(predictor, example, modality),
            input_example=example,
            pip_requirements=[f"modis-dist=={modis_dist.__version__}"],
        )


def _signature(predictor: "Predictor", example: "pd.DataFrame", modality: str) -> Any:
    from mlflow.models import infer_signature
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    names = dict.fromkeys(name for each in predictor.modalities for name in predictor.features(each))
    columns = [ColSpec(DataType.string, "sample_id", required=False)]
    columns += [ColSpec(DataType.double, name, required=False) for name in names]
    known = infer_signature(model_output=predictor.predict(example, modality=modality), params={"modality": modality})
    return ModelSignature(inputs=Schema(columns), outputs=known.outputs, params=known.params)


def _note(predictor: "Predictor") -> str:
    """How to use the model, for its page."""
    rows = [{"modality": m, "features": str(len(predictor.features(m)))} for m in predictor.modalities]
    call = f"predict(frame, params={{'modality': '{predictor.modalities[-1]}'}})"
    return (
        f"Classifies rows of one modality into {len(predictor.classes)} classes. `frame` has the modality's features "
        f"as columns and, where wanted, `sample_id`; the modality is {predictor.modalities[0]} unless named, as in "
        f"`{call}`. Loading needs `modis-dist`.\n\n{mlflow_text.table(rows)}"
    )


def _files(model_folder: Path) -> Iterator[Path]:
    """The files that make up a model, in a fixed order."""
    if not (model_folder / "best").is_dir():
        raise DataError(f"{shown(str(model_folder))}: no model here (folder `best` is missing); train it first")
    for part in PARTS:
        path = model_folder / part
        yield from sorted(found for found in [path, *path.rglob("*")] if found.is_file())


def _model_name(name: str) -> str:
    return "".join("-" if letter in "/:.%\"'" else letter for letter in name)
