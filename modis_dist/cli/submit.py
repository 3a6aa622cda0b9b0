"""`modis-dist submit`, `cancel`, `resume` and `fetch`: a study on a Slurm cluster."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from modis_dist.cli.options import Json, OutputFolder, Set, StudyFile, Wait, print_json, say, warn
from modis_dist.cli.tune import load_and_check
from modis_dist.cli.wait import wait_for_end

if TYPE_CHECKING:
    from modis_dist.config.cluster import Site
    from modis_dist.config.study import Study
    from modis_dist.integrations.slurm.form import Form
    from modis_dist.integrations.slurm.submission import SentJob, Submission


def submit(
    study: StudyFile,
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
        typer.Option("--form", help="Job array of packs, or one allocation; default: selected by study size."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print trials, packs, job scripts, GPU-hours and disk space; submit nothing."),
    ] = False,
    wait: Wait = False,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Submit a study to Slurm. Preempted jobs save a checkpoint, are requeued and resume with bit-identical results.

    Example: `modis-dist submit my_study.yaml --cluster cluster/generic_gpu.yaml --out /scratch/me/mine --dry-run`

    Next: `modis-dist status DIR`, `cancel DIR`, `resume DIR` and `fetch DIR --to LOCAL_DIR`.
    """
    from modis_dist.config.cluster import load_site
    from modis_dist.integrations.slurm.form import check_profile, form_of

    site, loaded = load_site(cluster), load_and_check(study, settings)
    chosen, reason = form_of(loaded, site, requested=form)
    check_profile(loaded, site, form=chosen)
    folder = out.absolute()
    if dry_run:
        from modis_dist.cli.dry_run import print_submission
        from modis_dist.planning.submission import estimate_submission

        estimate = estimate_submission(loaded, site, chosen, reason, folder, source=study)
        print_json(estimate.as_json()) if as_json else print_submission(estimate, site)
        return
    submission = _submit(loaded, site, chosen, folder, source=study)
    _finish(submission, submission.sent, folder, reason=reason, wait=wait, as_json=as_json)


def _submit(study: "Study", site: "Site", form: "Form", folder: Path, *, source: Path) -> "Submission":
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
            warn(f"warning: {finding.check}: {finding.message}; {finding.fix}")
    return submit(planned, site, form=form, out=folder)


def _finish(
    submission: "Submission", sent: "Sequence[SentJob]", folder: Path, *, reason: str, wait: bool, as_json: bool
) -> None:
    """Print a submission and the jobs just sent; with ``wait``, block until they have ended."""
    if not as_json:
        jobs = ", ".join(f"{job.kind} {job.number}" for job in sent)
        say(f"{submission.study}: submitted as {submission.form} ({reason}): {jobs}")
        say(f"next: modis-dist status {folder}")
    elif not wait:
        print_json(asdict(submission))
    if wait:
        wait_for_end(folder, as_json=as_json)


def cancel(directory: OutputFolder) -> None:
    """Cancel the jobs of a submission. Checkpoints are kept for `modis-dist resume`.

    Example: `modis-dist cancel /scratch/me/mine`
    """
    from modis_dist.integrations.slurm.submit import cancel as cancel_jobs

    live = cancel_jobs(directory.absolute())
    cancelled = f"cancelled {len(live)} job(s): {', '.join(live[:10])}{', ...' * (len(live) > 10)}"
    typer.echo(cancelled if live else "no job is pending or running")
    typer.echo(f"next: modis-dist resume {directory}" if live else f"next: modis-dist status {directory}")


def resume(
    directory: OutputFolder,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", metavar="PROFILE.yaml", help="New site profile, e.g. with more memory or time."),
    ] = None,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Submit the unfinished part of a study again. Finished trials are kept.

    Example: `modis-dist resume /scratch/me/mine`
    """
    from modis_dist.config.cluster import load_site
    from modis_dist.integrations.slurm.submission import load
    from modis_dist.integrations.slurm.submit import resume as resume_jobs
    from modis_dist.runtime.version import code

    folder = directory.absolute()
    before = load(folder)
    if before.code != code():
        warn(f"warning: the source code changed since the submission (version {before.version}); metrics may differ")
    submission = resume_jobs(folder, load_site(cluster) if cluster else None)
    marks = {job.mark for job in before.sent}
    sent = [job for job in submission.sent if job.mark not in marks]
    _finish(submission, sent, folder, reason="unfinished part", wait=wait, as_json=as_json)


def fetch(
    directory: OutputFolder,
    to: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="Destination folder, on a local disk.", file_okay=False)
    ],
    models: Annotated[
        Literal["chosen", "all"],
        typer.Option("--models", help="Copy the delivered model only, or also the best model of each trial."),
    ] = "chosen",
) -> None:
    """Copy the results of a submission to a local disk and fill an MLflow database there.

    Checkpoints are not copied. Repeat the command while the study runs to copy new results.

    Example: `modis-dist fetch /scratch/me/mine --to runs/mine`, then `modis-dist ui runs/mine`
    """
    from modis_dist.cli.display import named_bars, size
    from modis_dist.integrations.slurm.fetch import fetch as fetch_results

    def announce(files: int, total: int) -> None:
        warn(f"copying {files} files, {size(total)}, to {to}")

    out, copy = directory.absolute(), to.absolute()
    with named_bars() as progress:
        files, problems = fetch_results(out, copy, models=models, announce=announce, progress=progress)
    for problem in problems:
        warn(f"warning: MLflow: {problem}")
    typer.echo(f"{files} files copied to {to}; `modis-dist ui {to}` shows the metrics")
