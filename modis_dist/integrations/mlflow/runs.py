"""The runs of one MLflow experiment in our terms: found, made, written to and closed.

Keeps no state of trials; must not know journals or what a study is made of.
"""

import getpass
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import text as mlflow_text
from modis_dist.runtime.errors import ConfigError, ModisError, UserError
from modis_dist.runtime.text import shown

Status = Literal["FINISHED", "FAILED", "KILLED"]

FOLDER = "modis.folder"
NOTE = "mlflow.note.content"
NOT_UPLOADED = "modis.not_uploaded"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # else the pages begin with those for language models
MAX_METRICS = 1000  # per request, as are parameters
MAX_PARAMS = 100
FIGURES = {".png", ".svg", ".pdf", ".html"}
TABLES = {".csv", ".tsv", ".json", ".md"}
PERMANENT = frozenset(  # codes of MLflow's errors
    {"BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE", "PERMISSION_DENIED", "UNAUTHENTICATED"}
    | {"RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}
)


class Refused(ModisError):
    """What another process that asked MLflow got; ``permanent`` where asking again cannot help."""

    def __init__(self, text: str, *, permanent: bool = False) -> None:
        super().__init__(text)
        self.permanent = permanent


class Runs:
    """Runs of an experiment, which is made where it is missing; ``folder`` is where its artifacts go.

    Raises ``ConfigError`` where the experiment was deleted, and whatever MLflow raises.
    """

    def __init__(self, *, uri: str, experiment: str, folder: Path) -> None:
        self._client = mlflow_store.connect(uri)
        self._folder = folder
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            location = _artifact_location(uri, folder)
            made = self._client.create_experiment(experiment, artifact_location=location, tags=KIND)
            self.experiment_id = str(made)
        elif found.lifecycle_stage == "active":
            self.experiment_id = str(found.experiment_id)
        else:
            problem = f"{shown(experiment)} was deleted in MLflow; restore it there or choose another name"
            raise ConfigError([problem], source="sweep.mlflow.experiment_name")

    @property
    def client(self) -> Any:
        """MLflow's own client, for what is not about runs."""
        return self._client

    def search(self, query: str) -> list[Any]:
        """Every run that is not deleted and matches, newest first."""
        found, token = [], None
        while True:
            page = self._client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def get(self, run_id: str) -> Any:
        """One run as it is now."""
        return self._client.get_run(run_id)

    def end_abandoned(self) -> None:
        """End as KILLED the runs that a killed driver of this folder left open."""
        for run in self.search("attributes.status = 'RUNNING'"):
            if run.data.tags.get(FOLDER) == str(self._folder):
                self._client.set_terminated(run.info.run_id, "KILLED")

    def create(self, name: str, tags: Mapping[str, str]) -> str:
        """A new open run; returns its id."""
        fixed = {FOLDER: str(self._folder), "mlflow.user": _user(), "mlflow.source.name": "modis-dist"}
        clean = {mlflow_text.key(tag): mlflow_text.value(text) for tag, text in tags.items()}
        run = self._client.create_run(self.experiment_id, run_name=mlflow_text.value(name), tags=fixed | clean)
        return str(run.info.run_id)

    def reopen(self, run_id: str) -> None:
        """Open a closed run again."""
        self._client.update_run(run_id, status="RUNNING")

    def close(self, run_id: str, status: Status) -> None:
        """Close a run."""
        self._client.set_terminated(run_id, status)

    def is_deleted(self, run_id: str) -> bool:
        """Whether someone deleted the run."""
        from mlflow import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")

    def steps(self, run: Any, *, but: str) -> set[int]:
        """Steps at which a run has metrics; those whose name begins with ``but`` do not count."""
        names = [name for name in run.data.metrics if not name.startswith(but)]
        return {m.step for name in names for m in self._client.get_metric_history(run.info.run_id, name)}

    def send_records(self, run_id: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Log the metrics of journal records. Their own times are sent, so a second time changes nothing."""
        from mlflow.entities import Metric

        metrics = [
            Metric(mlflow_text.key(name), float(number), record["time_ms"], record["step"])
            for record in records
            for name, number in record["values"].items()
        ]
        self._send_metrics(run_id, metrics)

    def send_values(self, run_id: str, values: Mapping[str, float], *, model_id: str | None = None) -> None:
        """Log single numbers at step 0, of the run and where given of a model; those it has already are left out."""
        from mlflow.entities import Metric
        from mlflow.utils.time import get_current_time_millis

        now, known = get_current_time_millis(), self.get(run_id).data.metrics
        named = {mlflow_text.key(name): float(number) for name, number in values.items()}
        metrics = [Metric(n, v, now, 0, model_id=model_id) for n, v in named.items() if known.get(n) != v]
        self._send_metrics(run_id, metrics)

    def send_params(self, run_id: str, params: Mapping[str, Any], *, known: Mapping[str, str]) -> None:
        """Log the parameters of a nested tree that the run lacks; MLflow never changes one."""
        from mlflow.entities import Param

        new = [Param(name, text) for name, text in mlflow_text.flat(params).items() if name not in known]
        for start in range(0, len(new), MAX_PARAMS):
            self._client.log_batch(run_id, params=new[start : start + MAX_PARAMS])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags; an old value is replaced."""
        for tag, text in tags.items():
            self._client.set_tag(run_id, mlflow_text.key(tag), mlflow_text.value(text))

    def note(self, run_id: str, markdown: str) -> None:
        """The description on the run's page."""
        self._client.set_tag(run_id, NOTE, markdown)

    def upload(self, run_id: str, artifacts: Sequence[Path]) -> list[str]:
        """Store files and folders; returns what could not be stored and why."""
        problems = []
        for path in artifacts:
            try:
                if path.is_dir():
                    self._client.log_artifacts(run_id, str(path), artifact_path=path.name)
                else:
                    self._client.log_artifact(run_id, str(path), artifact_path=_kind(path))
            except Exception as error:
                problems.append(f"{path}: {error}")
        return problems

    def _send_metrics(self, run_id: str, metrics: Sequence[Any]) -> None:
        for start in range(0, len(metrics), MAX_METRICS):
            self._client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS])


def is_permanent(error: Exception) -> bool:
    """Whether trying again what raised this cannot help."""
    if isinstance(error, Refused):
        return error.permanent
    code = getattr(error, "error_code", None)  # of MLflow's exceptions
    if code is not None:
        return code in PERMANENT
    return isinstance(error, UserError | TypeError | ValueError | LookupError | AttributeError | ImportError)


def _artifact_location(uri: str, folder: Path) -> str | None:
    """A folder of ours, since MLflow would take the current folder; a server has its own."""
    if uri.startswith(("http:", "https:", "databricks:")):
        return None
    artifacts = folder / "mlflow-artifacts"
    artifacts.mkdir(mode=0o700, exist_ok=True)
    return artifacts.as_uri()


def _kind(path: Path) -> str | None:
    """The folder a file is shown in."""
    return "figures" if path.suffix in FIGURES else "tables" if path.suffix in TABLES else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have a user id without a name
        return "unknown"
