"""`modis-dist status DIR`: progress and state of a study, a submission or a training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modis_dist.cli.options import Json, OutputFolder, Wait, print_json, say
from modis_dist.cli.wait import wait_for_end
from modis_dist.integrations.slurm.folder import is_submitted

if TYPE_CHECKING:
    from rich.table import Table

    from modis_dist.integrations.slurm.submission_status import SubmissionStatus, Task
    from modis_dist.study.status import Status

FAILURES_SHOWN = 10
BAR_WIDTH = 30


def status(
    directory: OutputFolder,
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Show the progress of a study or run: trials, time left, failures and the next step. Changes nothing.

    Example: `modis-dist status runs/quickstart`

    Wait for a submission: `modis-dist status /scratch/me/mine --wait`
    """
    from modis_dist.runtime.errors import UserError
    from modis_dist.runtime.text import shown

    submitted = is_submitted(directory)
    if wait and not submitted:
        raise UserError(f"--wait: {shown(str(directory))}: no submission in this folder; omit --wait")
    if wait:
        wait_for_end(directory.absolute(), as_json=as_json)
    elif submitted:
        _submission(directory.absolute(), as_json=as_json)
    else:
        _study(directory, as_json=as_json)


def _submission(directory: Path, *, as_json: bool) -> None:
    import time
    from dataclasses import asdict

    from modis_dist.integrations.slurm.submission_status import submission_status

    progress = submission_status(directory)
    if as_json:
        values = asdict(progress)
        top = {**values.pop("study"), "state": values.pop("state"), "advice": values.pop("advice")}
        print_json({**top, "submission": values})
    else:
        _print_submission(progress, now=time.time())


def _study(directory: Path, *, as_json: bool) -> None:
    import time
    from dataclasses import asdict

    from modis_dist.study.status import status as status_of

    progress = status_of(directory)
    if as_json:
        print_json(asdict(progress))
        return
    by = f" by process {progress.holder.pid} on {progress.holder.host}" if progress.holder else ""
    say(f"{progress.name}: {progress.state}{by}; stage: {progress.stage}")
    _print(progress, now=time.time())
    say(f"next: {progress.advice}")


def _print_submission(submission: "SubmissionStatus", *, now: float) -> None:
    from modis_dist.runtime.text import shown

    name, stage = submission.study.name, submission.study.stage
    say(f"{name}: {submission.state}, submitted as {submission.form}; stage: {stage}")
    _print(submission.study, now=now, tasks=submission.tasks)
    for jobs in submission.jobs:
        states = ", ".join(f"{count} {state}" for state, count in jobs.states.items()) or "no longer in the queue"
        say(f"job {jobs.number} ({jobs.kind}): {states}{f' ({jobs.reason})' if jobs.reason else ''}")
    if submission.restarts:
        say(f"requeued: {submission.restarts} times in total")
    if submission.other_code:
        few = ", ".join(submission.other_code[:3]) + ", ..." * (len(submission.other_code) > 3)
        say(f"warning: {len(submission.other_code)} job(s) ran source code that differs from the submission: {few}")
    for name, reason in list(submission.failed.items())[:FAILURES_SHOWN]:
        say(f"failed: job {name}: {shown(reason)}")
    say(f"next: {submission.advice}")


def _print(progress: "Status", *, now: float, tasks: "Sequence[Task]" = ()) -> None:
    from modis_dist.cli.display import duration
    from modis_dist.report.terminal import stdout
    from modis_dist.runtime.text import shown

    say(f"trials: {_counted(progress.trials)}")
    if progress.refits:
        say(f"refits: {_counted(progress.refits)}")
    if any(pack.state == "running" for pack in progress.packs):
        stdout().print(_bars(progress, {task.pack: task for task in tasks}))
    if progress.last_update is not None:
        say(f"last update: {duration(now - progress.last_update)} ago")
    if (progress.state == "running" or progress.eta_s is not None) and progress.stage != "done":
        left = "unknown" if progress.eta_s is None else f"about {duration(progress.eta_s)} without early stopping"
        say(f"time left in this stage: {left}")
    for name, reason in list(progress.failures.items())[:FAILURES_SHOWN]:
        say(f"failed: {shown(name)}: {shown(reason)}")
    if len(progress.failures) > FAILURES_SHOWN:
        say(f"... and {len(progress.failures) - FAILURES_SHOWN} more; --json lists all")


def _bars(progress: "Status", tasks: Mapping[str, "Task"]) -> "Table":
    """Return a progress bar for every running pack, with its task."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    bars = Table.grid(padding=(0, 2))
    for pack in progress.packs:
        if pack.state == "running":
            total = "" if pack.epochs is None else f" of {pack.epochs}"
            trials = f"{len(pack.trials)} trials" if len(pack.trials) > 1 else "1 trial"
            pace = "" if pack.seconds_per_epoch is None else f"{pack.seconds_per_epoch:.2g} s per epoch"
            bar = ProgressBar(total=pack.epochs or 1, completed=pack.epoch if pack.epochs else 0, width=BAR_WIDTH)
            task = _task(tasks[pack.id]) if pack.id in tasks else ""
            bars.add_row(pack.id, bar, f"epoch {pack.epoch}{total}", trials, pace, task)
    return bars


def _task(task: "Task") -> str:
    on = f" on {task.node}" if task.node else ""
    return f"job {task.job}{on}" + (f", requeued {task.restarts} times" if task.restarts else "")


def _counted(trials: Mapping[str, int]) -> str:
    parts = ", ".join(f"{number} {state}" for state, number in trials.items())
    return f"{sum(trials.values())} ({parts})"
