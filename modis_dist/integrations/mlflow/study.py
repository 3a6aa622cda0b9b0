"""A study in MLflow, from its journals: a parent run for the study, a nested run for each trial.

Only the driver uses it, so MLflow has one writer. The journals are the truth: everything here can be sent again, and
what MLflow already has is neither repeated nor left out. Must not know how trainings run, nor Ray.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modis_dist.integrations.mlflow import pyfunc
from modis_dist.integrations.mlflow import store as mlflow_store
from modis_dist.integrations.mlflow import text as mlflow_text
from modis_dist.integrations.mlflow.runs import MAX_METRICS, NOT_UPLOADED, Runs, Status
from modis_dist.runtime.errors import ModisError
from modis_dist.runtime.text import shown

Records = Sequence[Mapping[str, Any]]

STUDY = "modis.study_id"
TRIAL = "modis.trial_id"
DELIVERED = "modis.delivered"  # set last: this finished run lacks nothing, a restart need not look at it again
REPLACES = "modis.replaces"
MODEL = "modis.model"
PARENT = "mlflow.parentRunId"
FINAL = "final/"


class NotUploaded(ModisError):
    """Artifacts stayed local; everything else of the call was done."""


@dataclass
class _Trial:
    """What is known of one nested run."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    run_id: str = ""  # empty until something is to be written
    asked: bool = False  # a run was asked for, which MLflow may have made without our hearing of it
    described: bool = False  # the run has its parameters
    open: bool = False
    delivered: bool = False
    steps: set[int] = field(default_factory=set)  # epochs that MLflow has


class Mirror:
    """One study in MLflow. Methods block until MLflow has taken what they send, and raise what it raises.

    ``folder`` is the output folder of the study, where artifacts go unless a server keeps them. Nothing is contacted
    before ``start``. Raises ``ConfigError`` for an address that cannot be used. After a restart the driver declares,
    feeds and ends every trial again, those of earlier starts too; what is there already costs nothing.
    """

    def __init__(self, *, uri: str, experiment: str, study: str, folder: Path) -> None:
        assert "'" not in study
        self.uri = mlflow_store.checked(uri)
        self.open = False  # the study is started and not finished
        self.gaps = False  # set where records were lost on the way here: then no run is marked as delivered
        self._experiment = experiment
        self._study = study
        self._folder = folder.absolute()
        self._runs: Runs
        self._parent = ""
        self._trials: dict[str, _Trial] = {}
        self._found: dict[str, Any] = {}  # runs of an earlier driver, by trial

    def describe(self) -> dict[str, str]:
        """Where the study is; ids are empty before ``start``, a password never shows."""
        return {
            "uri": mlflow_store.without_password(self.uri),
            "experiment": self._experiment,
            "experiment_id": self._runs.experiment_id if self._parent else "",
            "parent_run_id": self._parent,
        }

    def start(self, *, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Make the database, the experiment and the parent run, or find those of an earlier start."""
        self._runs = Runs(uri=self.uri, experiment=self._experiment, folder=self._folder)
        self._runs.end_abandoned()
        runs = self._runs.search(f"tags.`{STUDY}` = '{self._study}'")
        self._found = {run.data.tags[TRIAL]: run for run in reversed(runs) if TRIAL in run.data.tags}
        parents = [run for run in runs if TRIAL not in run.data.tags]
        name = f"{self._experiment} ({self._study[:8]})"
        self._parent = parents[0].info.run_id if parents else self._runs.create(name, {STUDY: self._study})
        self._runs.reopen(self._parent)
        self.open = True
        self._runs.send_params(self._parent, params, known=parents[0].data.params if parents else {})
        self._runs.set_tags(self._parent, tags)

    def trial(self, trial: str, *, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Declare a trial; its run is made when there is something to record."""
        self._trials[trial] = _Trial(name, params, tags)

    def feed(self, records: Records) -> None:
        """Send the metrics among the records of any trials; others and those already sent are passed over."""
        metrics = [record for record in records if record["kind"] == "metrics"]
        for trial in dict.fromkeys(record["trial"] for record in metrics):
            state = self._located(trial)
            mine = [r for r in metrics if r["trial"] == trial and r["step"] not in state.steps]
            for batch in [] if state.delivered else _batches(mine):
                self._opened(trial)
                self._send(trial, batch)
                state.steps.update(record["step"] for record in batch)

    def end_trial(self, trial: str, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path]) -> None:
        """Close a trial with its final metrics (recorded as ``final/<name>``) and files.

        Raises ``NotUploaded`` where files could not be stored; the run is closed all the same.
        """
        state = self._located(trial)
        if state.delivered:
            return
        self._opened(trial)
        self._runs.send_values(state.run_id, {FINAL + name: number for name, number in metrics.items()})
        problems = self._runs.upload(state.run_id, artifacts)
        self._runs.note(state.run_id, mlflow_text.numbers(metrics))
        self._close(state.run_id, status, problems)
        state.open = False
        state.delivered = status == "FINISHED"
        _raise(problems)

    def finish(
        self, *, status: Status, metrics: Mapping[str, float], artifacts: Sequence[Path], model: Path | None
    ) -> None:
        """Close the study with its summary, files and best model; trials still open are ended as KILLED.

        ``model`` is the folder of a finished run. Raises ``NotUploaded`` like ``end_trial``.
        """
        problems = self._runs.upload(self._parent, artifacts)
        model_id = None
        if model is not None:
            try:
                model_id = self._log_model(model)
            except Exception as error:
                problems.append(f"model: {error}")
        self._runs.send_values(self._parent, metrics, model_id=model_id)
        for state in self._trials.values():
            if state.open:
                self._runs.close(state.run_id, "KILLED")
                state.open = False
        self._runs.note(self._parent, self._summary(metrics))
        self._close(self._parent, status, problems)
        self.open = False
        _raise(problems)

    def close(self) -> None:
        """Nothing is left to do: what MLflow has taken it has kept."""

    def _located(self, trial: str) -> _Trial:
        """The trial, with what an earlier driver left of it."""
        state = self._trials.setdefault(trial, _Trial(trial))
        run = self._found.pop(trial, None)
        if run is None:
            return state
        state.run_id = run.info.run_id
        state.delivered = DELIVERED in run.data.tags
        if not state.delivered:
            steps = self._runs.steps(run, but=FINAL)
            state.steps = steps - {max(steps, default=0)}  # of the last a killed driver may have sent a part
            self._runs.send_params(state.run_id, state.params, known=run.data.params)
            state.described = True
            self._runs.set_tags(state.run_id, {PARENT: self._parent})
        return state

    def _opened(self, trial: str) -> None:
        """Make or reopen the run of a trial that is about to be written to."""
        state = self._trials[trial]
        if not state.run_id:
            self._create(trial, {})
        elif not state.open:
            self._runs.reopen(state.run_id)
        self._describe(state)
        state.open = True

    def _create(self, trial: str, tags: Mapping[str, str]) -> None:
        """A run for a trial, or that which an earlier try has made although it failed."""
        state = self._trials[trial]
        fixed = {STUDY: self._study, PARENT: self._parent, TRIAL: trial}
        query = f"tags.`{PARENT}` = '{self._parent}' and tags.`{TRIAL}` = '{trial}'"
        made = self._runs.search(query) if state.asked else []
        state.asked = True
        if made:
            state.run_id = made[0].info.run_id
        else:
            state.run_id = self._runs.create(state.name, {**state.tags, **fixed, **tags})

    def _describe(self, state: _Trial) -> None:
        """Send the parameters of a trial's run, unless it has them: the try that made it may have failed there."""
        if not state.described:
            self._runs.send_params(state.run_id, state.params, known={})
            state.described = True

    def _send(self, trial: str, records: Records) -> None:
        """Send records; where someone deleted the run, a new one that names it takes over."""
        state = self._trials[trial]
        try:
            self._runs.send_records(state.run_id, records)
        except Exception:
            if not self._runs.is_deleted(state.run_id):
                raise
            self.gaps = True  # the next start sends what the deleted run had
            state.asked = state.described = False
            self._create(trial, {REPLACES: state.run_id})
            self._describe(state)
            self._runs.send_records(state.run_id, records)

    def _log_model(self, folder: Path) -> str:
        """Id of the model in MLflow; the same files are not stored twice."""
        digest = pyfunc.digest(folder)
        kept, _, model_id = self._runs.get(self._parent).data.tags.get(MODEL, "").partition(" ")
        if kept == digest:
            return str(model_id)
        model_id = pyfunc.log(
            self._runs.client,
            model_folder=folder,
            experiment_id=self._runs.experiment_id,
            run_id=self._parent,
            name=self._experiment,
        )
        self._runs.set_tags(self._parent, {MODEL: f"{digest} {model_id}"})
        return model_id

    def _close(self, run_id: str, status: Status, problems: Sequence[str]) -> None:
        if problems:
            self._runs.set_tags(run_id, {NOT_UPLOADED: mlflow_store.scrubbed("; ".join(problems), self.uri)})
        elif status == "FINISHED" and not self.gaps:
            self._runs.set_tags(run_id, {DELIVERED: "true"})
        self._runs.close(run_id, status)

    def _summary(self, metrics: Mapping[str, float]) -> str:
        """What the study found, as Markdown for the parent's page."""
        runs = self._runs.search(f"tags.`{STUDY}` = '{self._study}' and tags.`{PARENT}` = '{self._parent}'")
        runs.sort(key=lambda run: run.info.start_time)
        done = sum(run.info.status == "FINISHED" for run in runs)
        rows = [
            {"trial": run.info.run_name, "status": run.info.status.lower()}
            | {name: mlflow_text.number(value) for name, value in _pooled(run.data.metrics).items()}
            for run in runs
        ]
        head = f"**{done} of {len(runs)} trials finished.** Output folder: {mlflow_text.plain(str(self._folder))}"
        return f"{head}\n\n#### Result\n\n{mlflow_text.numbers(metrics)}\n\n#### Trials\n\n{mlflow_text.table(rows)}"


def _batches(records: Records) -> Iterator[list[Mapping[str, Any]]]:
    """Consecutive records with at most 1000 metrics together, or a single record."""
    batch: list[Mapping[str, Any]] = []
    size = 0
    for record in records:
        if batch and size + len(record["values"]) > MAX_METRICS:
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += len(record["values"])
    if batch:
        yield batch


def _pooled(metrics: Mapping[str, float]) -> dict[str, float]:
    """The final figures of all modalities together; the others are on the run's own page."""
    final = {name.removeprefix(FINAL): value for name, value in metrics.items() if name.startswith(FINAL)}
    return {name: value for name, value in final.items() if "/" not in name}


def _raise(problems: Sequence[str]) -> None:
    if problems:
        raise NotUploaded(f"not uploaded to MLflow, kept in the output folder: {shown('; '.join(problems))}")
