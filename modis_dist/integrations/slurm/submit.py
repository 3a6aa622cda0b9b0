"""Submission, resubmission and cancellation of the jobs of a study.

A job is recorded before it is sent, with a mark by which the queue finds it, so that no job is sent twice.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from modis_dist.config.cluster import Site
from modis_dist.config.parse import dump
from modis_dist.execution.run_pack import unfinished_packs
from modis_dist.integrations.slurm.folder import PROFILE, STUDY, folder_of, is_submitted
from modis_dist.integrations.slurm.form import Form, check_profile
from modis_dist.integrations.slurm.job_script import LOGS, STATUS, script
from modis_dist.integrations.slurm.job_status import STARTING
from modis_dist.integrations.slurm.queue import NotSeen, Queue
from modis_dist.integrations.slurm.submission import (
    SentJob,
    Submission,
    load,
    packs_of,
    queue_of,
    save,
    site_of,
    study_of,
)
from modis_dist.runtime.errors import ModisError, UserError
from modis_dist.runtime.file_systems import OF_ONE_MACHINE, file_system
from modis_dist.runtime.files import write_text
from modis_dist.runtime.lock import locked
from modis_dist.runtime.text import shown
from modis_dist.runtime.version import __version__, code
from modis_dist.study import manifest
from modis_dist.study.plan import Plan, ids_of

# --- submit -----------------------------------------------------------------------------------------------------


def submit(planned: Plan, site: Site, *, form: Form, out: Path) -> Submission:
    """Submit a study. Raises ``UserError`` if one was already submitted from this folder, or Slurm refuses a job."""
    folder = folder_of(out)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(out, patience_s=0), locked(folder, patience_s=0):
        refuse_if_submitted(out)
        _warn_of_local(planned, site, out)
        return send(out, create(planned, site, form=form, out=out), site, queue=queue_of(site))


def refuse_if_submitted(out: Path) -> None:
    """Raise ``UserError`` if a study was already submitted from a folder, or Slurm cannot use its path."""
    if "%" in str(out):
        raise UserError(f"--out: {shown(str(out))}: Slurm treats % in a path as a pattern; use a folder without %")
    if not is_submitted(out):
        return
    queue = queue_of(site_of(out))
    submission = adopt(out, load(out), queue)
    if submission.sent:
        refuse_if_live(out, submission, queue)
        raise UserError(
            f"{out}: already submitted; `modis-dist status` shows its state, `modis-dist resume` submits the "
            "unfinished part; use another --out for another study"
        )


def create(planned: Plan, site: Site, *, form: Form, out: Path) -> Submission:
    """Write the record of a submission without jobs."""
    folder = folder_of(out)
    for name in ("scripts", LOGS, STATUS):
        (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(folder / STUDY, dump(planned.study))
    write_text(folder / PROFILE, dump(site))
    write_text(out / manifest.STUDY_FILE, dump(planned.study))
    packs = ids_of([pack.trials for pack in planned.packs()]) if form == "array" else ()
    manifest.save(out / manifest.FILE, replace(planned.manifest, packs=packs))
    store = str(planned.store.path.absolute())
    submission = Submission(planned.study.name, form, store, packs, (), __version__, code())
    save(out, submission)
    return submission


def send(out: Path, submission: Submission, site: Site, *, queue: Queue) -> Submission:
    """Send the jobs for all packs that are not done, or none: if one is refused, the earlier ones are cancelled.

    Raises the errors of the queue.
    """
    packs, before = packs_of(out, submission), submission
    left = {pack.id for pack in unfinished_packs(out, packs)}
    numbers: list[str] = []
    try:
        for job in jobs_of(submission.form, [n for n, pack in enumerate(packs) if pack.id in left], site):
            # Arrays wait for each other; otherwise each would run `array_parallelism` tasks.
            after = numbers if job.kind == "finish" else numbers[-1:]
            submission = _send_job(out, submission, site, job, queue, after=after)
            numbers.append(str(submission.sent[-1].number))
    except UserError as error:
        queue.cancel(numbers)
        uncertain = load(out).sent[-1:] if isinstance(error, NotSeen) else ()  # the queue may list its mark later
        save(out, replace(before, sent=(*before.sent, *uncertain)))
        raise UserError(f"{error}; nothing was submitted") from None
    return submission


def _send_job(
    out: Path, submission: Submission, site: Site, job: SentJob, queue: Queue, *, after: Sequence[str]
) -> Submission:
    text, sent = _script(submission.study, site, job, out), submission.sent
    save(out, replace(submission, sent=(*sent, job)))
    number = queue.submit(text, folder=folder_of(out), mark=job.mark, tasks=job.indices, after=after)
    submission = replace(submission, sent=(*sent, replace(job, number=number)))
    save(out, submission)
    return submission


def jobs_of(form: Form, packs: Sequence[int], site: Site) -> list[SentJob]:
    """Return the jobs that train packs and end the study, in order."""
    if form == "allocation":
        return [SentJob("allocation")]
    arrays = [SentJob("array", first=first, indices=indices) for first, indices in chunks(packs, site.max_array)]
    return [*arrays, SentJob("finish")]


def chunks(numbers: Sequence[int], size: int) -> list[tuple[int, tuple[int, ...]]]:
    """Split ascending pack numbers into arrays: for each the pack of index 0, and its indices below ``size``."""
    arrays: list[tuple[int, tuple[int, ...]]] = []
    for number in numbers:
        if not arrays or number - arrays[-1][0] >= size:
            arrays.append((number, ()))
        first, indices = arrays[-1]
        arrays[-1] = (first, (*indices, number - first))
    return arrays


def scripts_of(planned: Plan, site: Site, *, form: Form, out: Path) -> dict[str, str]:
    """Return one script per kind of job that would be sent; warn as ``submit`` does."""
    _warn_of_local(planned, site, out)
    jobs = jobs_of(form, range(len(unfinished_packs(out, planned.packs()))), site)
    scripts = {}
    for kind in dict.fromkeys(job.kind for job in jobs):
        alike = [job for job in jobs if job.kind == kind]
        name = f"{kind}.sh" + (f" (first of {len(alike)})" if len(alike) > 1 else "")
        scripts[name] = _script(planned.study.name, site, alike[0], out)
    return scripts


def _script(study: str, site: Site, job: SentJob, out: Path) -> str:
    return script(site, kind=job.kind, name=study, out=out, first=job.first, indices=job.indices)


def _warn_of_local(planned: Plan, site: Site, out: Path) -> None:
    """Log a warning if other nodes may not see the output folder or the store."""
    store = planned.store.path.absolute()
    kinds = {f"--out: {out}": file_system(out), f"the store: {store}": file_system(store)}
    local = [f"{folder} ({kind})" for folder, kind in kinds.items() if kind in OF_ONE_MACHINE]
    if local and site.executor == "slurm":
        logging.getLogger(__name__).warning(
            "on a local file system: %s; if the nodes do not see it, jobs fail without a message. Use folders on a "
            "shared file system, unless this machine exports these",
            " and ".join(local),
        )


def adopt(out: Path, submission: Submission, queue: Queue) -> Submission:
    """Add the ids of jobs whose sender was killed before it recorded them."""
    if all(job.number is not None for job in submission.sent):
        return submission
    jobs = [job if job.number is not None else replace(job, number=queue.marked(job.mark)) for job in submission.sent]
    submission = replace(submission, sent=tuple(job for job in jobs if job.number is not None))
    save(out, submission)
    return submission


# --- resume and cancel ------------------------------------------------------------------------------------------


def resume(out: Path, site: Site | None = None) -> Submission:
    """Submit the unfinished part of a study, with another profile if one is given.

    Raises ``UserError`` if jobs are pending or running, ``ConfigError`` if the profile does not suit the study.
    """
    submission = load(out)
    with locked(folder_of(out), patience_s=0):
        before = site_of(out)
        queue = queue_of(before)
        submission = adopt(out, submission, queue)
        refuse_if_live(out, submission, queue)
        if site is not None and site.executor != before.executor:
            raise UserError(f"--cluster: executor is {site.executor}; the jobs were submitted with {before.executor}")
        check_profile(study_of(out), site or before, form=submission.form)
        if site is not None:
            write_text(folder_of(out) / PROFILE, dump(site))
        submission = replace(submission, version=__version__, code=code())
        if submission.form == "array":  # the last job may have split crashed packs
            submission = replace(submission, packs=manifest.load(out / manifest.FILE).packs)
        with _without_old_notes(folder_of(out) / STATUS):
            return send(out, submission, site or before, queue=queue)


@contextmanager
def _without_old_notes(folder: Path) -> Iterator[None]:
    """Remove the status files of earlier jobs; restore them if the block fails."""
    earlier = {path: path.read_text() for path in (*folder.glob("*.json"), *folder.glob(f"*{STARTING}"))}
    for path in earlier:
        path.unlink()
    try:
        yield
    except ModisError:
        for path, text in earlier.items():
            write_text(path, text)
        raise


def refuse_while_live(out: Path) -> None:
    """Raise ``UserError`` if jobs of an output folder's submission are pending or running."""
    refuse_if_live(out, load(out), queue_of(site_of(out)))


def refuse_if_live(out: Path, submission: Submission, queue: Queue) -> None:
    """Raise ``UserError`` if jobs of a submission are pending or running."""
    if live := _live(submission, queue):
        ids = ", ".join(live[:3]) + ", ..." * (len(live) > 3)
        raise UserError(
            f"{out}: {len(live)} job(s) of this submission are pending or running ({ids}); `modis-dist status` lists "
            "them, `modis-dist cancel` cancels them"
        )


def cancel(out: Path) -> list[str]:
    """Cancel the pending and running jobs of a submission and return their ids. Checkpoints are kept."""
    submission = load(out)
    with locked(folder_of(out), patience_s=0):
        queue = queue_of(site_of(out))
        submission = adopt(out, submission, queue)
        live = _live(submission, queue)
        arrays = {job.partition("_")[0] for job in live}
        queue.cancel([number for number in submission.numbers if number in arrays])
    return live


def _live(submission: Submission, queue: Queue) -> list[str]:
    return [job.id for job in queue.jobs(submission.numbers).values() if job.live]
