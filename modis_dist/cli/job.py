"""`modis-dist job ...`: the commands inside Slurm jobs. Users run `modis-dist submit`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="The commands inside Slurm jobs.", no_args_is_help=True)
Out = Annotated[Path, typer.Argument(metavar="DIR", exists=True, file_okay=False, show_default=False)]
MLFLOW_PATIENCE_S = 60.0  # Slurm ends all processes with the job


@app.command()
def array(directory: Out, pack: Annotated[int, typer.Argument(min=0)]) -> None:
    """Train one pack of an array."""
    from modis_dist.integrations.slurm.array import train_pack

    train_pack(directory, pack)


@app.command()
def finish(directory: Out) -> None:
    """Select among the trials that an array trained, refit and test."""
    from modis_dist.cli.tune import fail_if_incomplete, print_summary, run
    from modis_dist.integrations.slurm.array import AfterArray, StopBetweenPacks, job
    from modis_dist.integrations.slurm.submission import site_of, study_of

    with job(directory, "finish", site_of(directory)) as flag:
        source, executor_with_stop = (
            directory / "submission" / "study.yaml",
            StopBetweenPacks(AfterArray(directory), flag),
        )
        summary = run(study_of(directory), directory, executor_with_stop, source, mlflow_patience_s=MLFLOW_PATIENCE_S)
    print_summary(summary, directory)
    fail_if_incomplete(summary, directory)


@app.command()
def allocation(directory: Out) -> None:
    """Train a study on all nodes of this job."""
    from modis_dist.cli.tune import fail_if_incomplete, print_summary, run
    from modis_dist.integrations.ray.tune import RayExecutor
    from modis_dist.integrations.slurm.allocation import ray_of_job
    from modis_dist.integrations.slurm.array import StopBetweenPacks, job
    from modis_dist.integrations.slurm.submission import site_of, study_of

    study, site = study_of(directory), site_of(directory)
    resources, device, workers = study.sweep.resources, study.trainer.device, study.trainer.workers
    with (
        job(directory, "allocation", site) as flag,
        ray_of_job(directory, site) as backend,
        RayExecutor(resources, backend=backend, device=device, workers=workers) as executor,
    ):
        source, executor_with_stop = directory / "submission" / "study.yaml", StopBetweenPacks(executor, flag)
        summary = run(study, directory, executor_with_stop, source, mlflow_patience_s=MLFLOW_PATIENCE_S)
    print_summary(summary, directory)
    fail_if_incomplete(summary, directory)


@app.command()
def node(
    rendezvous: Out,
    cpus: Annotated[int, typer.Option(min=1)] = 1,
    gpus: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Run Ray on this node of a job."""
    from modis_dist.integrations.ray.multi_node import serve

    serve(rendezvous, cpus=cpus, gpus=gpus)


@app.command()
def here(
    script: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    task: Annotated[list[int] | None, typer.Option()] = None,
    after: Annotated[list[str] | None, typer.Option()] = None,
) -> None:
    """Run a job script on this machine after other jobs have ended."""
    from modis_dist.integrations.slurm.local_queue import run_here

    run_here(script, tasks=task or (), after=after or ())


@app.command("all-reduce")
def all_reduce(folder: Out) -> None:
    """Take part in the all-reduce check of `modis-dist doctor`."""
    from modis_dist.integrations.doctor.all_reduce import take_part

    take_part(folder)
