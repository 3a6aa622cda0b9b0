"""`modis-dist tune`: run a study from its YAML file to its summary."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, RayAddress, Set, StudyFile, print_json, say, warn
from modis_dist.integrations.slurm.folder import is_submitted
from modis_dist.runtime.errors import SweepIncomplete, UserError
from modis_dist.runtime.text import shown

if TYPE_CHECKING:
    from modis_dist.config.study import Study
    from modis_dist.integrations.mlflow.follower import Follower
    from modis_dist.report.study_results import Summary
    from modis_dist.study.interfaces import Executor, Tracking

MLFLOW_PATIENCE_S = 5.0
CONFIGURATIONS_SHOWN = 20


def tune(
    study: StudyFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Output folder; default: runs/NAME.", file_okay=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, packs, time and disk space; start nothing.")
    ] = False,
    ray: RayAddress = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train all trials of a study, select the best configuration, refit and test it. Rerun to resume.

    Example: `modis-dist tune tune_spaces/quickstart.yaml --dry-run`

    On a running Ray cluster: `modis-dist tune my_study.yaml --ray node1:6379`
    """
    loaded = load_and_check(study, settings)
    folder = (out or Path("runs") / loaded.name).absolute()
    if is_submitted(folder) and not dry_run:
        from modis_dist.integrations.slurm.submit import refuse_while_live

        refuse_while_live(folder)
    with _executor(loaded, ray) as executor:
        if dry_run:
            scratch = None if ray else Path(tempfile.gettempdir())
            _print_estimate(loaded, folder, executor, source=study, scratch=scratch, as_json=as_json)
            return
        summary = run(loaded, folder, executor, study)
    report(summary, folder, as_json=as_json)


def load_and_check(path: Path, settings: list[str] | None) -> "Study":
    """Load a study and report the mistakes that need no data, before ray and torch are imported."""
    from modis_dist.config.parse import load_study
    from modis_dist.data.open_store import named_store
    from modis_dist.study.manifest import expand

    study = load_study(path, settings or [])
    expand(study, "", source=str(path))
    named_store(study.data, source=str(path))
    return study


def _print_estimate(
    study: "Study", folder: Path, executor: "Executor", *, source: Path, scratch: Path | None, as_json: bool
) -> None:
    """Print what a study would take; ``scratch``: folder of Ray's temporary files, if on this machine."""
    from dataclasses import asdict

    from modis_dist.cli.dry_run import print_plan
    from modis_dist.planning.estimate import START_UP_S, Nodes, estimate_plan, planning_folder
    from modis_dist.study.plan import plan

    slots = executor.slots
    nodes = Nodes(slots, slots, executor.threads, timing_folder=folder, scratch_folder=scratch)
    with planning_folder(study, folder) as temporary:
        planned = plan(study, out=temporary, slots=slots, source=str(source))
        estimate = estimate_plan(planned, temporary, nodes, start_s=START_UP_S[study.sweep.executor])
    print_json(asdict(estimate)) if as_json else print_plan(estimate)


def run(
    study: "Study", folder: Path, executor: "Executor", source: Path, *, mlflow_patience_s: float = MLFLOW_PATIENCE_S
) -> "Summary":
    """Run a study from its first trial to its summary, with progress bars and MLflow.

    ``mlflow_patience_s``: maximum time to wait for the MLflow follower at the end; it then continues in the background.
    """
    from modis_dist.cli.display import SweepBars, progress_bars
    from modis_dist.integrations.mlflow.follower import Follower
    from modis_dist.study.plan import plan
    from modis_dist.study.run import run_study

    planned = plan(study, out=folder, slots=executor.slots, source=str(source))
    if planned.outdated:
        warn(
            f"note: {len(planned.outdated)} trials of an earlier run are no longer part of this study; their results "
            f"remain in {folder / 'trials'}"
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    follower = Follower(folder)
    tracking = _tracking(study, folder, follower)
    try:
        with progress_bars() as bars:
            return run_study(planned, out=folder, executor=executor, display=SweepBars(bars), tracking=tracking)
    finally:
        for problem in follower.wait(mlflow_patience_s):
            warn(f"note: MLflow: {problem}")


@contextmanager
def _executor(study: "Study", ray: str | None) -> Iterator["Executor"]:
    resources, workers = study.sweep.resources, study.trainer.workers
    if study.sweep.executor == "local":
        from modis_dist.execution.local import LocalExecutor

        if ray is not None:
            raise UserError("--ray: sweep.executor is local; add --set sweep.executor=ray")
        yield LocalExecutor(resources, workers=workers)
    else:
        from modis_dist.integrations.ray.existing_cluster import ray_at
        from modis_dist.integrations.ray.tune import RayExecutor

        device = study.trainer.device
        with (
            ray_at(ray) as backend,
            RayExecutor(resources, backend=backend, device=device, workers=workers) as executor,
        ):
            yield executor


def _tracking(study: "Study", folder: Path, follower: "Follower") -> "Tracking | None":
    """Return the MLflow store of a study, by default a SQLite file; None if MLflow is disabled.

    Also None, with a note, if the SQLite file would be on a network file system.
    """
    from modis_dist.integrations.mlflow.store import checked, default_uri, network_problem, without_password
    from modis_dist.study.interfaces import Tracking

    settings = study.sweep.mlflow
    if not settings.enabled:
        return None
    if settings.tracking_uri is None and (problem := network_problem(folder)):
        command = f"modis-dist mlflow-sync {folder} --uri sqlite:////LOCAL/mlflow.db"
        if is_submitted(folder):
            command = f"modis-dist fetch {folder} --to LOCAL_DIR"
        warn(
            f"note: MLflow is off: {problem}. All metrics are in packs/*/journal.jsonl; `{command}` fills a database "
            "on a local disk"
        )
        return None
    uri = checked(settings.tracking_uri or default_uri(folder))
    return Tracking(without_password(uri), settings.experiment_name or study.name, follower.start)


def report(summary: "Summary", folder: Path, *, as_json: bool) -> None:
    """Print the results of a finished study. Raises ``SweepIncomplete`` if trials failed."""
    from modis_dist.report.study import models, resumed_elsewhere, tables
    from modis_dist.report.terminal import show, stdout

    if as_json:
        print_json(summary)
    else:
        show(tables(summary, max_groups=CONFIGURATIONS_SHOWN), stdout())
        for line in [*models(summary), *resumed_elsewhere(summary)]:
            say(line)
        say(f"Report, figures and the model are in {folder}; `modis-dist ui {folder}` shows the curves.")
    if failures := summary["failures"]:
        reasons = "; ".join(shown(reason) for reason in sorted(set(failures.values()))[:3])
        raise SweepIncomplete(f"{len(failures)} trial(s) failed ({reasons}); results of the others are in {folder}")
