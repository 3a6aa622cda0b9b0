"""`modis-dist tune`: the main job, a study from its YAML file to its summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, RayAddress, Set, print_json
from modis_dist.runtime.errors import UserError

if TYPE_CHECKING:
    from modis_dist.config.study import Study
    from modis_dist.integrations.mlflow.follower import Follower
    from modis_dist.report.study_results import Summary
    from modis_dist.study.interfaces import Executor, Tracking
    from modis_dist.study.plan import Plan

MLFLOW_PATIENCE_S = 5.0
CONFIGURATIONS_SHOWN = 20


def tune(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Folder for the results; runs/NAME by default.", file_okay=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, packs, time and disk; start nothing.")
    ] = False,
    ray: RayAddress = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Train every trial of a study, choose, refit, test. Running it again continues where it stopped.

    Example: `modis-dist tune tune_spaces/quickstart.yaml --dry-run`

    On the nodes of a Ray: `modis-dist tune my_study.yaml --ray node1:6379`
    """
    from modis_dist.cli.dry_run import print_plan
    from modis_dist.config.parse import load_study
    from modis_dist.data.store.open_store import named_store
    from modis_dist.study.manifest import expand

    wanted = load_study(study, settings or [])
    expand(wanted, "", source=str(study))  # needs no data
    named_store(wanted.data, source=str(study))  # what is missing is said before ray and torch are loaded
    folder = (out or Path("runs") / wanted.name).absolute()
    if (folder / "submission" / "submission.json").exists() and not dry_run:
        from modis_dist.integrations.slurm.submit import refuse_while_live

        refuse_while_live(folder)
    with _executor(wanted, ray) as executor:
        if dry_run:
            import tempfile
            from dataclasses import asdict

            from modis_dist.planning.estimate import START_UP_S, Nodes, estimate_plan, planning_folder

            scratch = None if ray else Path(tempfile.gettempdir())
            slots = executor.slots
            nodes = Nodes(slots, slots, executor.threads, probe_folder=folder, scratch_folder=scratch)
            with planning_folder(wanted, folder) as place:
                planned = _plan(wanted, place, executor, study)
                estimate = estimate_plan(planned, place, nodes, start_s=START_UP_S[wanted.sweep.executor])
            print_json(asdict(estimate)) if as_json else print_plan(estimate)
            return
        summary = run(wanted, folder, executor, study)
    if as_json:
        print_json(summary)
    else:
        print_summary(summary, folder)
    fail_if_incomplete(summary, folder)


def _plan(study: "Study", folder: Path, executor: "Executor", source: Path) -> "Plan":
    from modis_dist.study.plan import plan

    return plan(study, out=folder, slots=executor.slots, source=str(source))


def run(
    study: "Study", folder: Path, executor: "Executor", source: Path, *, mlflow_patience_s: float = MLFLOW_PATIENCE_S
) -> "Summary":
    """Run a study from its first trial to its summary, with progress bars and MLflow.

    ``mlflow_patience_s``: wait at most this long for MLflow in the end; where processes may stay it catches up alone.
    """
    from modis_dist.cli.display import errors, sweep_bars
    from modis_dist.integrations.mlflow.follower import Follower
    from modis_dist.study.run import run_study

    planned = _plan(study, folder, executor, source)
    if planned.outdated:
        errors().print(
            f"note: {len(planned.outdated)} trials of an earlier start are not part of this study any more; "
            f"their results stay in {folder / 'trials'}",
            markup=False,
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    follower = Follower(folder)
    tracking = _tracking(study, folder, follower)
    try:
        with sweep_bars() as bars:
            return run_study(planned, out=folder, executor=executor, display=bars, tracking=tracking)
    finally:
        for problem in follower.wait(mlflow_patience_s):
            errors().print(f"note: MLflow: {problem}", markup=False)


@contextmanager
def _executor(study: "Study", ray: str | None) -> Iterator["Executor"]:
    resources, workers = study.sweep.resources, study.trainer.workers
    if study.sweep.executor == "local":
        from modis_dist.execution.local import LocalExecutor

        if ray is not None:
            raise UserError("--ray: the study trains in this process; --set sweep.executor=ray has it use a Ray")
        yield LocalExecutor(resources, workers=workers)
    else:
        from modis_dist.integrations.ray.existing_cluster import ray_at
        from modis_dist.integrations.ray.tune import RayExecutor

        with (
            ray_at(ray) as place,
            RayExecutor(resources, backend=place, device=study.trainer.device, workers=workers) as executor,
        ):
            yield executor


def _tracking(study: "Study", folder: Path, follower: "Follower") -> "Tracking | None":
    """Return where the study is tracked: by default in a SQLite file, except on a network file system."""
    from modis_dist.cli.display import errors
    from modis_dist.integrations.mlflow.store import checked, default_uri, without_password
    from modis_dist.runtime.file_systems import NETWORK, file_system
    from modis_dist.study.interfaces import Tracking

    settings = study.sweep.mlflow
    if not settings.enabled:
        return None
    if settings.tracking_uri is None and (kind := file_system(folder)) in NETWORK:
        submitted = (folder / "submission" / "submission.json").exists()
        later = f"`modis-dist mlflow-sync {folder} --uri sqlite:////LOCAL/mlflow.db` fills a database later"
        if submitted:
            later = f"`modis-dist fetch {folder} --to DIR`, on a local disk, fills a database"
        errors().print(
            f"note: {folder} is on a network file system ({kind}), where MLflow's SQLite gets damaged: no MLflow. "
            f"All metrics are in packs/*/journal.jsonl; {later}.",
            markup=False,
        )
        return None
    uri = checked(settings.tracking_uri or default_uri(folder))
    return Tracking(without_password(uri), settings.experiment_name or study.name, follower.start)


def print_summary(summary: "Summary", folder: Path) -> None:
    """The tables of a finished study."""
    from modis_dist.report.study import models, resumed_elsewhere, tables
    from modis_dist.report.terminal import show, stdout

    console = stdout()
    show(tables(summary, most=CONFIGURATIONS_SHOWN), console)
    for line in [*models(summary), *resumed_elsewhere(summary)]:
        console.print(line, markup=False, soft_wrap=True)
    console.print(
        f"Report, figures and the model are in {folder}; `modis-dist ui {folder}` shows the curves.",
        markup=False,
        soft_wrap=True,
    )


def fail_if_incomplete(summary: "Summary", folder: Path) -> None:
    """Raise ``SweepIncomplete`` where trials failed."""
    from modis_dist.runtime.errors import SweepIncomplete
    from modis_dist.runtime.text import shown

    failures = summary["failures"]
    if failures:
        reasons = "; ".join(shown(reason) for reason in sorted(set(failures.values()))[:3])
        raise SweepIncomplete(
            f"{len(failures)} trials failed ({reasons}); the others are finished and kept in {folder}"
        )
