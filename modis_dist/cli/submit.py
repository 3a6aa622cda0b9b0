"""`modis-dist submit`, `cancel`, `resume` and `fetch`: a study on a cluster, from a login node and back home."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modis_dist.cli.options import Json, Set, Wait, print_json
from modis_dist.cli.wait import wait_for_end

if TYPE_CHECKING:
    from modis_dist.config.cluster import Site
    from modis_dist.config.study import Study
    from modis_dist.integrations.slurm.submission import Form, Sent, Submission


Submitted = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="The --out of `modis-dist submit`.", show_default=False, exists=True, file_okay=False
    ),
]


def submit(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.", show_default=False)],
    cluster: Annotated[
        Path, typer.Option("--cluster", metavar="PROFILE.yaml", help="The site's profile; see cluster/README.md.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder for the results, which all nodes see.", file_okay=False),
    ],
    form: Annotated[
        Literal["array", "allocation"] | None,
        typer.Option("--form", help="A job array of packs, or one allocation; by the study's size where not given."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, packs, job scripts, hours and disk; submit nothing.")
    ] = False,
    wait: Wait = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Put a study on a Slurm cluster. Jobs that are stopped save, are queued again and go on to the bit.

    Example: `modis-dist submit my_study.yaml --cluster cluster/generic_gpu.yaml --out /scratch/me/mine --dry-run`

    Then: `modis-dist status DIR`, `cancel DIR`, `resume DIR`, and `fetch DIR --to HOME`.
    """
    from modis_dist.config.cluster import load_site
    from modis_dist.config.parse import load_study
    from modis_dist.data.store.open_store import named_store
    from modis_dist.integrations.slurm.submission import check, form_of
    from modis_dist.study.manifest import expand

    site = load_site(cluster)
    wanted = load_study(study, settings or [])
    expand(wanted, "", source=str(study))  # needs no data
    named_store(wanted.data, source=str(study))
    shape, why = form_of(wanted, site, asked=form)
    check(wanted, site, form=shape)
    folder = out.absolute()
    if dry_run:
        from modis_dist.cli.dry_run_jobs import foresee

        foresee(wanted, site, shape, why, folder, source=study, as_json=as_json)
        return
    submission = _submitted(wanted, site, shape, folder, source=study)
    if not (wait and as_json):
        _tell(submission, submission.sent, folder, why=why, as_json=as_json)
    if wait:
        wait_for_end(folder, as_json=as_json)


def _submitted(wanted: "Study", site: "Site", form: "Form", folder: Path, *, source: Path) -> "Submission":
    from modis_dist.cli.display import errors
    from modis_dist.integrations.slurm.capacity import refuse_if_too_large, room
    from modis_dist.integrations.slurm.submission import refuse_if_submitted, slots_of, submit
    from modis_dist.study.plan import plan

    refuse_if_submitted(folder)
    planned = plan(wanted, out=folder, slots=slots_of(wanted, site, form), source=str(source), gpu=site.gpus > 0)
    found = room(planned, site)
    refuse_if_too_large(found, wanted)
    for finding in found:
        if finding.level == "warning":
            errors().print(f"note: {finding.what}: {finding.found}; {finding.advice}", markup=False)
    return submit(planned, site, form=form, out=folder)


def _tell(submission: "Submission", sent: "Sequence[Sent]", folder: Path, *, why: str, as_json: bool) -> None:
    """What a submission is, and which jobs of it were sent just now."""
    from dataclasses import asdict

    from modis_dist.report.terminal import stdout

    if as_json:
        print_json(asdict(submission))
        return
    console = stdout()
    jobs = ", ".join(f"{job.kind} {job.number}" for job in sent)
    console.print(f"{submission.study}: submitted as {submission.form} ({why}): {jobs}", markup=False, soft_wrap=True)
    console.print(f"next: modis-dist status {folder}", markup=False, soft_wrap=True)


def cancel(directory: Submitted) -> None:
    """Cancel the jobs of a submission; what they have saved is kept, and `resume` goes on from there.

    Example: `modis-dist cancel /scratch/me/mine`
    """
    from modis_dist.integrations.slurm.submission import cancel as cancel_jobs

    live = cancel_jobs(directory.absolute())
    said = f"cancelled {len(live)} job(s): {', '.join(live[:10])}{', ...' * (len(live) > 10)}"
    typer.echo(said if live else "no job of it waits or runs")
    typer.echo(f"next: modis-dist resume {directory}" if live else f"next: modis-dist status {directory}")


def resume(
    directory: Submitted,
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster", metavar="PROFILE.yaml", help="Another profile from now on, e.g. with more memory or time."
        ),
    ] = None,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Submit what is not done of a submission again; what is done is not trained twice.

    Example: `modis-dist resume /scratch/me/mine`
    """
    from modis_dist.config.cluster import load_site
    from modis_dist.integrations.slurm.submission import load
    from modis_dist.integrations.slurm.submission import resume as send_again

    folder = directory.absolute()
    _note_if_changed(folder)
    before = {job.mark for job in load(folder).sent}
    submission = send_again(folder, load_site(cluster) if cluster else None)
    sent = [job for job in submission.sent if job.mark not in before]
    if not (wait and as_json):
        _tell(submission, sent, folder, why="what was not done", as_json=as_json)
    if wait:
        wait_for_end(folder, as_json=as_json)


def _note_if_changed(folder: Path) -> None:
    from modis_dist.cli.display import errors
    from modis_dist.integrations.slurm.submission import load
    from modis_dist.runtime.version import code

    before = load(folder)
    if before.code != code():
        errors().print(
            f"note: this program is not the one that submitted (version {before.version}); figures may differ "
            "from what that would have reached",
            markup=False,
        )


def fetch(
    directory: Submitted,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Folder for the copy, on a local disk.", file_okay=False)
    ],
    models: Annotated[
        Literal["chosen", "all"],
        typer.Option("--models", help="The chosen model, or the best one of every trial too, which may be large."),
    ] = "chosen",
) -> None:
    """Copy the results of a submission, checkpoints left out, and fill MLflow there.

    Example: `modis-dist fetch /scratch/me/mine --to runs/mine`, then `modis-dist ui runs/mine`. May be repeated.
    """
    from modis_dist.cli.display import errors, modality_bars, size
    from modis_dist.integrations.slurm.fetch import fetch as bring

    def announced(files: int, held: int) -> None:
        errors().print(f"copying {files} files, {size(held)}, to {to}", markup=False)

    with modality_bars() as told:
        brought = bring(directory.absolute(), to.absolute(), models=models, announced=announced, told=told)
    for problem in brought.problems:
        errors().print(f"note: MLflow: {problem}", markup=False)
    typer.echo(f"{brought.files} files are in {to}; `modis-dist ui {to}` shows the curves")
