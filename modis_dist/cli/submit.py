"""`modis-dist submit`, `cancel`, `resume` and `fetch`: a study on a Slurm cluster."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modis_dist.cli.options import Json, Set, Wait, print_json
from modis_dist.cli.wait import wait_for_end

if TYPE_CHECKING:
    from modis_dist.config.cluster import Site
    from modis_dist.config.study import Study
    from modis_dist.integrations.slurm.form import Form
    from modis_dist.integrations.slurm.submission import SentJob, Submission


SubmittedFolder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="The --out of `modis-dist submit`.", show_default=False, exists=True, file_okay=False
    ),
]


def submit(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="The study.", show_default=False)],
    cluster: Annotated[
        Path, typer.Option("--cluster", metavar="PROFILE.yaml", help="Site profile; see cluster/README.md.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Output folder, on a file system that all nodes share.", file_okay=False
        ),
    ],
    form: Annotated[
        Literal["array", "allocation"] | None,
        typer.Option("--form", help="Job array of packs, or one allocation; default: chosen by the study's size."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, packs, job scripts, hours and disk; submit nothing.")
    ] = False,
    wait: Wait = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Submit a study to Slurm. Jobs that are preempted save a checkpoint, are requeued and resume bit-identically.

    Example: `modis-dist submit my_study.yaml --cluster cluster/generic_gpu.yaml --out /scratch/me/mine --dry-run`

    Next: `modis-dist status DIR`, `cancel DIR`, `resume DIR`, and `fetch DIR --to HOME`.
    """
    from modis_dist.config.cluster import load_site
    from modis_dist.config.parse import load_study
    from modis_dist.data.store.open_store import named_store
    from modis_dist.integrations.slurm.form import check_profile, form_of
    from modis_dist.study.manifest import expand

    site = load_site(cluster)
    loaded = load_study(study, settings or [])
    expand(loaded, "", source=str(study))  # needs no data
    named_store(loaded.data, source=str(study))
    chosen, why = form_of(loaded, site, requested=form)
    check_profile(loaded, site, form=chosen)
    folder = out.absolute()
    if dry_run:
        from modis_dist.cli.dry_run import print_submission
        from modis_dist.planning.submission import estimate_submission

        estimate = estimate_submission(loaded, site, chosen, why, folder, source=study)
        print_json(estimate.as_json()) if as_json else print_submission(estimate, site)
        return
    submission = _submit(loaded, site, chosen, folder, source=study)
    if not (wait and as_json):
        _print(submission, submission.sent, folder, why=why, as_json=as_json)
    if wait:
        wait_for_end(folder, as_json=as_json)


def _submit(study: "Study", site: "Site", form: "Form", folder: Path, *, source: Path) -> "Submission":
    from modis_dist.cli.display import errors
    from modis_dist.integrations.slurm.capacity import check_capacity, refuse_if_too_large
    from modis_dist.integrations.slurm.form import slots_of
    from modis_dist.integrations.slurm.submit import refuse_if_submitted, submit
    from modis_dist.study.plan import plan

    refuse_if_submitted(folder)
    planned = plan(study, out=folder, slots=slots_of(study, site, form), source=str(source), gpu=site.gpus > 0)
    findings = check_capacity(planned, site)
    refuse_if_too_large(findings, study)
    for finding in findings:
        if finding.level == "warning":
            errors().print(f"warning: {finding.check}: {finding.message}; {finding.fix}", markup=False)
    return submit(planned, site, form=form, out=folder)


def _print(submission: "Submission", sent: "Sequence[SentJob]", folder: Path, *, why: str, as_json: bool) -> None:
    """Print a submission and those of its jobs that were sent just now."""
    from dataclasses import asdict

    from modis_dist.report.terminal import stdout

    if as_json:
        print_json(asdict(submission))
        return
    console = stdout()
    jobs = ", ".join(f"{job.kind} {job.number}" for job in sent)
    console.print(f"{submission.study}: submitted as {submission.form} ({why}): {jobs}", markup=False, soft_wrap=True)
    console.print(f"next: modis-dist status {folder}", markup=False, soft_wrap=True)


def cancel(directory: SubmittedFolder) -> None:
    """Cancel the jobs of a submission; checkpoints are kept for `resume`.

    Example: `modis-dist cancel /scratch/me/mine`
    """
    from modis_dist.integrations.slurm.submit import cancel as cancel_jobs

    live = cancel_jobs(directory.absolute())
    cancelled = f"cancelled {len(live)} job(s): {', '.join(live[:10])}{', ...' * (len(live) > 10)}"
    typer.echo(cancelled if live else "no job is pending or running")
    typer.echo(f"next: modis-dist resume {directory}" if live else f"next: modis-dist status {directory}")


def resume(
    directory: SubmittedFolder,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", metavar="PROFILE.yaml", help="New site profile, e.g. with more memory or time."),
    ] = None,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Submit the unfinished part of a submission again; finished trials are kept.

    Example: `modis-dist resume /scratch/me/mine`
    """
    from modis_dist.config.cluster import load_site
    from modis_dist.integrations.slurm.submission import load
    from modis_dist.integrations.slurm.submit import resume as resume_jobs

    folder = directory.absolute()
    before = load(folder)
    _warn_if_code_changed(before)
    submission = resume_jobs(folder, load_site(cluster) if cluster else None)
    marks = {job.mark for job in before.sent}
    sent = [job for job in submission.sent if job.mark not in marks]
    if not (wait and as_json):
        _print(submission, sent, folder, why="what was not done", as_json=as_json)
    if wait:
        wait_for_end(folder, as_json=as_json)


def _warn_if_code_changed(before: "Submission") -> None:
    from modis_dist.cli.display import errors
    from modis_dist.runtime.version import code

    if before.code != code():
        errors().print(
            f"warning: this source code differs from the submitting one (version {before.version}); metrics may differ",
            markup=False,
        )


def fetch(
    directory: SubmittedFolder,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Folder for the copy, on a local disk.", file_okay=False)
    ],
    models: Annotated[
        Literal["chosen", "all"],
        typer.Option("--models", help="Copy the chosen model only, or also the best model of every trial (large)."),
    ] = "chosen",
) -> None:
    """Copy the results of a submission, without checkpoints, and fill an MLflow store there. May be repeated.

    Example: `modis-dist fetch /scratch/me/mine --to runs/mine`, then `modis-dist ui runs/mine`
    """
    from modis_dist.cli.display import errors, modality_bars, size
    from modis_dist.integrations.slurm.fetch import fetch as fetch_results

    def announce(files: int, total: int) -> None:
        errors().print(f"copying {files} files, {size(total)}, to {to}", markup=False)

    with modality_bars() as progress:
        fetched = fetch_results(directory.absolute(), to.absolute(), models=models, announced=announce, told=progress)
    for problem in fetched.problems:
        errors().print(f"warning: MLflow: {problem}", markup=False)
    typer.echo(f"{fetched.files} files copied to {to}; `modis-dist ui {to}` shows the metrics")
