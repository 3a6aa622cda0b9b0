"""`modis-dist job`: commands that Slurm jobs run. Users run `modis-dist submit`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.tune import report, run

if TYPE_CHECKING:
    from modis_dist.report.study_results import Summary
    from modis_dist.study.interfaces import Executor

app = typer.Typer(help="Commands that Slurm jobs run.", no_args_is_help=True)
Out = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Output or rendezvous folder.", exists=True, file_okay=False, show_default=False
    ),
]
MLFLOW_PATIENCE_S = 60.0  # Slurm ends all processes with the job


@app.command()
def array(directory: Out, pack: Annotated[int, typer.Argument(min=0, metavar="PACK", help="Pack number.")]) -> None:
    """Train one pack of an array."""
    from modis_dist.integrations.slurm.jobs import train_pack

    train_pack(directory, pack)


@app.command()
def finish(directory: Out) -> None:
    """Select the best configuration of an array, refit and test."""
    from modis_dist.integrations.slurm.jobs import AfterArray, StopBetweenPacks, job
    from modis_dist.integrations.slurm.submission import site_of

    with job(directory, "finish", site_of(directory)) as flag:
        summary = _run(directory, StopBetweenPacks(AfterArray(directory), flag))
    report(summary, directory, as_json=False)


@app.command()
def allocation(directory: Out) -> None:
    """Run a study on all nodes of this job."""
    from modis_dist.integrations.ray.tune import RayExecutor
    from modis_dist.integrations.slurm.jobs import StopBetweenPacks, job, ray_of_job
    from modis_dist.integrations.slurm.submission import site_of, study_of

    study, site = study_of(directory), site_of(directory)
    resources, device, workers = study.sweep.resources, study.trainer.device, study.trainer.workers
    with (
        job(directory, "allocation", site) as flag,
        ray_of_job(directory, site) as backend,
        RayExecutor(resources, backend=backend, device=device, workers=workers) as executor,
    ):
        summary = _run(directory, StopBetweenPacks(executor, flag))
    report(summary, directory, as_json=False)


def _run(directory: Path, executor: "Executor") -> "Summary":
    from modis_dist.config.parse import load_study
    from modis_dist.integrations.slurm.folder import STUDY, folder_of

    source = folder_of(directory) / STUDY
    return run(load_study(source), directory, executor, source, mlflow_patience_s=MLFLOW_PATIENCE_S)


@app.command()
def node(
    rendezvous: Out,
    cpus: Annotated[int, typer.Option(min=1, help="CPU cores.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs.")] = 0,
) -> None:
    """Start Ray on this node of the job."""
    from modis_dist.integrations.ray.multi_node import serve

    serve(rendezvous, cpus=cpus, gpus=gpus)


@app.command()
def local(
    script: Annotated[Path, typer.Argument(metavar="SCRIPT", help="Job script.", exists=True, dir_okay=False)],
    task: Annotated[list[int] | None, typer.Option(help="Index of an array task; may be repeated.")] = None,
    after: Annotated[list[str] | None, typer.Option(help="Id of a job to wait for; may be repeated.")] = None,
) -> None:
    """Run a job script on this machine, after other jobs have ended."""
    from modis_dist.integrations.slurm.local_queue import run_local

    run_local(script, tasks=task or (), after=after or ())


@app.command("all-reduce")
def all_reduce(folder: Out) -> None:
    """Run one process of the all-reduce check of `modis-dist doctor`."""
    from modis_dist.integrations.doctor.all_reduce import run_rank

    run_rank(folder)
