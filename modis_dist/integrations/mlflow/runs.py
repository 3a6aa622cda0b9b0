"""Search, create, write and close the runs of one MLflow experiment.

Independent of studies and trials.
"""

import errno
import getpass
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import text as mlflow_text
from modis_dist.runtime.errors import ConfigError, UserError
from modis_dist.runtime.lock import holder
from modis_dist.runtime.text import shown
from modis_dist.train.journal import Record

RunStatus = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

FOLDER = "modis.folder"
DELIVERED = "modis.delivered"  # digest of the file that closed the run; set last, when nothing is missing
NOT_UPLOADED = "modis.not_uploaded"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # otherwise the UI opens pages for language models
MAX_METRICS = 1000  # per request, like MAX_PARAMS
MAX_PARAMS = 100
FIGURES = {".png", ".svg", ".pdf", ".html"}
TABLES = {".csv", ".tsv", ".json", ".md"}
REFUSED = frozenset({"BAD_REQUEST", "INVALID_PARAMETER_VALUE"})  # error codes of MLflow
PERMANENT = REFUSED | {"INVALID_STATE", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_DOES_NOT_EXIST"}
UNREADABLE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS})


class Runs:
    """Runs of an experiment, which is created if it is missing; artifacts go to ``folder`` unless a server stores them.

    Raises ``ConfigError`` if the experiment was deleted, and the errors of MLflow.
    """

    def __init__(self, *, uri: str, experiment: str, folder: Path) -> None:
        self.client = mlflow_store.connect(uri)
        self._uri, self._folder = uri, folder
        existing = self.client.get_experiment_by_name(experiment)
        if existing is None:
            location = _artifact_location(uri, folder)
            self.experiment_id = str(self.client.create_experiment(experiment, artifact_location=location, tags=KIND))
        elif existing.lifecycle_stage == "active":
            self.experiment_id = str(existing.experiment_id)
        else:
            problem = f"{shown(experiment)} was deleted in MLflow; restore it there or choose another name"
            raise ConfigError([problem], source="sweep.mlflow.experiment_name")
        self._close_abandoned()

    def search(self, query: str) -> list[Any]:
        """Return matching active runs, newest first."""
        runs, token = [], None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def create(self, name: str, tags: Mapping[str, str], *, start_ms: int | None = None) -> str:
        """Create a run with status RUNNING and return its id."""
        fixed = {FOLDER: str(self._folder), "mlflow.user": _user(), "mlflow.source.name": "modis-dist"}
        clean = {mlflow_text.key(tag): mlflow_text.value(text) for tag, text in tags.items()}
        label = mlflow_text.value(name)
        run = self.client.create_run(self.experiment_id, start_time=start_ms, run_name=label, tags=fixed | clean)
        return str(run.info.run_id)

    def reopen(self, run_id: str) -> None:
        self.client.update_run(run_id, status="RUNNING")

    def close(self, run_id: str, status: RunStatus, *, end_ms: int | None = None) -> None:
        self.client.set_terminated(run_id, status, end_time=end_ms)

    def finish(self, run_id: str, status: RunStatus, *, problems: Sequence[str], delivered: str, end_ms: int) -> None:
        """Close a run; a tag lists the problems or, if there are none, has the digest of what was ``delivered``."""
        self.close(run_id, status, end_ms=end_ms)
        if problems:
            self.set_tags(run_id, {NOT_UPLOADED: mlflow_store.scrubbed("; ".join(problems), self._uri)})
        elif delivered:
            self.set_tags(run_id, {DELIVERED: delivered})

    def is_deleted(self, run_id: str) -> bool:
        from mlflow import MlflowException

        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")

    def logged(self, run_id: str) -> set[tuple[str, int]]:
        """Return key and step of every metric value of a run."""
        keys = self.client.get_run(run_id).data.metrics
        return {(key, metric.step) for key in keys for metric in self.client.get_metric_history(run_id, key)}

    def send_records(self, run_id: str, records: Sequence[Record]) -> None:
        """Log the metrics of journal records with their own timestamps: MLflow stores identical values once."""
        from mlflow.entities import Metric

        metrics = [
            Metric(mlflow_text.key(name), float(number), record["time_ms"], record["step"])
            for record in records
            for name, number in record["values"].items()
        ]
        self._send_metrics(run_id, metrics)

    def send_values(
        self, run_id: str, values: Mapping[str, float], *, time_ms: int, model_id: str | None = None
    ) -> None:
        """Log values that a run lacks at step 0, also for a model if given."""
        from mlflow.entities import Metric

        known = self.client.get_run(run_id).data.metrics
        named = {mlflow_text.key(name): float(number) for name, number in values.items()}
        # Compared as text, so that nan equals nan.
        new = {key: number for key, number in named.items() if repr(known.get(key)) != repr(number)}
        self._send_metrics(run_id, [Metric(key, new[key], time_ms, 0, model_id=model_id) for key in new])

    def send_params(self, run_id: str, params: Mapping[str, Any], *, known: Mapping[str, str]) -> None:
        """Log the parameters of a nested tree that are not ``known``: MLflow parameters are immutable."""
        from mlflow.entities import Param

        new = [Param(name, text) for name, text in mlflow_text.flat(params).items() if name not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self.client.log_batch(run_id, params=new[start : start + MAX_PARAMS])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        for tag, text in tags.items():
            self.client.set_tag(run_id, mlflow_text.key(tag), mlflow_text.value(text))

    def upload(self, run_id: str, artifacts: Sequence[Path]) -> list[str]:
        """Upload files and folders; return a problem for each that cannot be stored. Raises if a retry may help."""
        problems = []
        for path in artifacts:
            try:
                if path.is_dir():
                    self.client.log_artifacts(run_id, str(path), artifact_path=path.name)
                else:
                    kind = "figures" if path.suffix in FIGURES else "tables" if path.suffix in TABLES else None
                    self.client.log_artifact(run_id, str(path), artifact_path=kind)
            except Exception as error:
                if not is_permanent(error) and getattr(error, "errno", None) not in UNREADABLE:
                    raise
                problems.append(f"{path}: {error}")
        return problems

    def _close_abandoned(self) -> None:
        """Close as KILLED the runs of other folders whose driver and follower have both died."""
        for run in self.search("attributes.status = 'RUNNING'"):
            folder = run.data.tags.get(FOLDER, str(self._folder))
            if folder != str(self._folder) and (driver := holder(Path(folder))) and driver.alive is False:
                self.close(run.info.run_id, "KILLED")

    def _send_metrics(self, run_id: str, metrics: Sequence[Any]) -> None:
        for start in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def is_permanent(error: Exception) -> bool:
    """Return whether a retry cannot help."""
    code = getattr(error, "error_code", None)  # of MlflowException
    if code is not None:
        return code in PERMANENT
    return isinstance(error, UserError | TypeError | ValueError | LookupError | AttributeError | ImportError)


def is_refused_record(error: Exception) -> bool:
    """Return whether MLflow rejected a value rather than the request as a whole."""
    return getattr(error, "error_code", None) in REFUSED


def _artifact_location(uri: str, folder: Path) -> str | None:
    """Return the artifact folder for a database (MLflow would take the current folder); a server has its own."""
    if uri.startswith(("http:", "https:", "databricks:")):
        return None
    artifacts = folder / "mlflow-artifacts"
    artifacts.mkdir(mode=0o700, exist_ok=True)
    return artifacts.as_uri()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have a user id without a name
        return "unknown"
