"""A finished model in MLflow's pyfunc format, so that any MLflow tool can load and serve it.

Nothing is pickled and no code is copied: the format names this module as loader, and ``_load_pyfunc`` opens the run's
files (safetensors, JSON, YAML) with the installed package. Loading needs ``modis_dist`` in the environment::

    model = mlflow.pyfunc.load_model("models:/<id>")
    model.predict(frame)                                  # the run's first modality
    model.predict(frame, params={"modality": "mirna"})    # any other

``frame`` has the features of that modality as columns (float64 or float32) and optionally ``sample_id``. The signature
lists the features of every modality as optional columns, since a call has those of one modality; a missing
feature of that modality raises ``DataError``.
"""

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import modis_dist
from modis_dist.config.parse import digest as tree_digest
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.runtime.errors import DataError
from modis_dist.runtime.files import sha256
from modis_dist.runtime.text import shown

if TYPE_CHECKING:
    import pandas as pd

    from modis_dist.evaluate.predictor import Predictor

# Only the files that prediction needs: a run's folder may also contain predictions with sample ids.
PARTS = ("best", "run.yaml")
DIGEST = "modis.digest"


class PyfuncModel:
    """The model object that ``mlflow.pyfunc.load_model`` wraps."""

    def __init__(self, predictor: "Predictor") -> None:
        self._predictor = predictor

    def predict(self, model_input: "pd.DataFrame", params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Return class, its probability and the probability of each class, one row per row of the input."""
        modality = (params or {}).get("modality", self._predictor.modalities[0])
        return self._predictor.predict(model_input, modality=modality)


def _load_pyfunc(path: str) -> PyfuncModel:
    """Load the model from the folder that ``save`` stored; MLflow calls this."""
    return PyfuncModel(modis_dist.load(path))


def save(model_folder: Path, destination: Path, *, identity: Any = None) -> None:
    """Write the model of a finished run as an MLflow model folder; ``destination`` must not exist.

    ``identity`` is an ``mlflow.models.Model``. Raises ``DataError`` if the run's folder has no model.
    """
    mlflow_store.prepare()
    import mlflow.pyfunc

    with TemporaryDirectory() as folder:
        copy = Path(folder, "modis")
        for path in _files(model_folder):
            target = copy / path.relative_to(model_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        predictor = modis_dist.load(copy)  # the copy must load without the original
        example = _example(predictor)
        mlflow.pyfunc.save_model(
            destination,
            loader_module=__name__,
            data_path=str(copy),
            mlflow_model=identity,
            signature=_signature(predictor, example),
            input_example=example,
            pip_requirements=[f"modis-dist=={modis_dist.__version__}"],
        )


def log(client: Any, *, model_folder: Path, experiment_id: str, run_id: str, name: str) -> str:
    """Log a model as an output of a run, unless the same files are logged; return the id of the model.

    ``mlflow.pyfunc.log_model`` makes it an output before the upload: a retry after a crash would leave a second output.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    files = digest(model_folder)
    for logged in client.search_logged_models([experiment_id], f"tags.`{DIGEST}` = '{files}'"):
        if logged.source_run_id == run_id and str(logged.status) == "READY":
            return str(logged.model_id)
        if logged.source_run_id == run_id:
            client.delete_logged_model(logged.model_id)  # incomplete: the process was killed
    record = client.create_logged_model(
        experiment_id,
        name=re.sub(r"[/:.%\"']", "-", name),
        source_run_id=run_id,
        model_type="classifier",
        tags={DIGEST: files},
    )
    try:
        identity = Model(
            artifact_path=record.artifact_location, run_id=run_id, model_uuid=record.model_id, model_id=record.model_id
        )
        with TemporaryDirectory() as folder:
            saved = Path(folder, "model")
            save(model_folder, saved, identity=identity)
            client.log_model_artifacts(record.model_id, str(saved))
        client.log_outputs(run_id, [LoggedModelOutput(record.model_id, step=0)])
    except BaseException:
        client.finalize_logged_model(record.model_id, "FAILED")
        raise
    client.finalize_logged_model(record.model_id, "READY")
    return str(record.model_id)


def digest(model_folder: Path) -> str:
    """Return the SHA-256 over names and bytes of a model's files."""
    return tree_digest({str(path.relative_to(model_folder)): sha256(path) for path in _files(model_folder)})


def _example(predictor: "Predictor") -> "pd.DataFrame":
    """Return a row of zeros with the columns of the first modality (no patient data)."""
    import pandas as pd

    zeros = pd.DataFrame(0.0, index=[0], columns=list(predictor.features(predictor.modalities[0])))
    zeros.insert(0, "sample_id", "example")
    return zeros


def _signature(predictor: "Predictor", example: "pd.DataFrame") -> Any:
    from mlflow.models import infer_signature
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    names = dict.fromkeys(name for each in predictor.modalities for name in predictor.features(each))
    columns = [ColSpec(DataType.string, "sample_id", required=False)]
    columns += [ColSpec(DataType.double, name, required=False) for name in names]
    default = predictor.modalities[0]
    inferred = infer_signature(model_output=predictor.predict(example, modality=default), params={"modality": default})
    return ModelSignature(inputs=Schema(columns), outputs=inferred.outputs, params=inferred.params)


def _files(model_folder: Path) -> Iterator[Path]:
    """Yield the files of a model in a fixed order."""
    if not (model_folder / "best").is_dir():
        raise DataError(f"{shown(str(model_folder))}: no model (folder `best` is missing); train it first")
    for part in PARTS:
        path = model_folder / part
        yield from sorted(file for file in [path, *path.rglob("*")] if file.is_file())
