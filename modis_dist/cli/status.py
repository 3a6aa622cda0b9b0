"""`modis-dist status DIR`: how far a study, a submission or a training is, whether it lives, and what to do next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modis_dist.cli.options import Json, Wait, print_json
from modis_dist.cli.wait import wait_for_end

if TYPE_CHECKING:
    from rich.table import Table

    from modis_dist.integrations.slurm.submission_status import SubmissionStatus, Task
    from modis_dist.study.status import Status

FAILURES_SHOWN = 10
BAR_WIDTH = 30


def status(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Output folder of a study or a run.", show_default=False, exists=True, file_okay=False
        ),
    ],
    wait: Wait = False,
    as_json: Json = False,
) -> None:
    """Show how far a study or a training is: trials, time left, failures, and what to do. Changes nothing.

    Example: `modis-dist status runs/quickstart`

    What was put on a cluster can be waited for: `modis-dist status /scratch/me/mine --wait`
    """
    import time
    from dataclasses import asdict

    from modis_dist.runtime.errors import UserError
    from modis_dist.runtime.text import shown
    from modis_dist.study.status import status as status_of

    if (directory / "submission" / "submission.json").exists():
        from modis_dist.integrations.slurm.submission_status import standing

        if wait:
            wait_for_end(directory.absolute(), as_json=as_json)
            return
        on_cluster = standing(directory.absolute())
        if as_json:
            jobs = {key: value for key, value in asdict(on_cluster).items() if key not in {"study", "state", "advice"}}
            told = {"state": on_cluster.state, "advice": on_cluster.advice, "submission": jobs}
            print_json(asdict(on_cluster.study) | told)
        else:
            _print_submission(on_cluster, now=time.time())
        return
    if wait:
        raise UserError(f"--wait: {shown(str(directory))}: nothing was submitted from here; its own command waits")
    found = status_of(directory)
    if as_json:
        print_json(asdict(found))
        return
    by = f" by process {found.holder.pid} on {found.holder.host}" if found.holder else ""
    _say(f"{found.name}: {found.state}{by}; stage: {found.stage}")
    _print(found, now=time.time())
    _say(f"next: {found.advice}")


def _print_submission(found: "SubmissionStatus", *, now: float) -> None:
    from modis_dist.runtime.text import shown

    _say(f"{found.study.name}: {found.state}, submitted as {found.form}; stage: {found.study.stage}")
    _print(found.study, now=now, tasks=found.tasks)
    for jobs in found.jobs:
        states = (
            ", ".join(f"{many} {state}" for state, many in jobs.states.items()) or "not known to the queue any more"
        )
        _say(f"job {jobs.number} ({jobs.kind}): {states}{f' ({jobs.waits_for})' if jobs.waits_for else ''}")
    if found.restarts:
        _say(f"queued again: {found.restarts} times in all")
    if found.other_program:
        few = ", ".join(found.other_program[:3]) + ", ..." * (len(found.other_program) > 3)
        _say(f"note: the program was changed after submitting; {len(found.other_program)} job(s) ran changed: {few}")
    for name, reason in list(found.failed.items())[:FAILURES_SHOWN]:
        _say(f"failed: job {name}: {shown(reason)}")
    _say(f"next: {found.advice}")


def _say(line: str) -> None:
    from modis_dist.report.terminal import stdout

    stdout().print(line, markup=False, soft_wrap=True)


def _print(found: "Status", *, now: float, tasks: "Sequence[Task]" = ()) -> None:
    """What both kinds of status have."""
    from modis_dist.cli.display import duration
    from modis_dist.report.terminal import stdout
    from modis_dist.runtime.text import shown

    console, say = stdout(), _say
    say(f"trials: {_counted(found.trials)}")
    if found.refits:
        say(f"refits: {_counted(found.refits)}")
    if any(pack.state == "running" for pack in found.packs):
        console.print(_bars(found, {task.pack: task for task in tasks}))
    if found.last_sign is not None:
        say(f"last sign of life: {duration(now - found.last_sign)} ago")
    if (found.state == "running" or found.eta_s is not None) and found.stage != "done":
        left = "unknown yet" if found.eta_s is None else f"about {duration(found.eta_s)}, less with early stopping"
        say(f"time left in this stage: {left}")
    for name, reason in list(found.failures.items())[:FAILURES_SHOWN]:
        say(f"failed: {shown(name)}: {shown(reason)}")
    if len(found.failures) > FAILURES_SHOWN:
        say(f"... and {len(found.failures) - FAILURES_SHOWN} more; --json lists all")


def _bars(found: "Status", tasks: Mapping[str, "Task"]) -> "Table":
    """A bar for every running pack, with the task that trains it."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    bars = Table.grid(padding=(0, 2))
    for pack in found.packs:
        if pack.state == "running":
            of = "" if pack.epochs is None else f" of {pack.epochs}"
            many = f"{len(pack.trials)} trials" if len(pack.trials) > 1 else "1 trial"
            pace = "" if pack.seconds_per_epoch is None else f"{pack.seconds_per_epoch:.2g} s an epoch"
            bar = ProgressBar(total=pack.epochs or 1, completed=pack.epoch if pack.epochs else 0, width=BAR_WIDTH)
            where = _place(tasks[pack.id]) if pack.id in tasks else ""
            bars.add_row(pack.id, bar, f"epoch {pack.epoch}{of}", many, pace, where)
    return bars


def _place(task: "Task") -> str:
    on = f" on {task.node}" if task.node else ""
    return f"job {task.job}{on}" + (f", queued again {task.restarts} times" if task.restarts else "")


def _counted(trials: Mapping[str, int]) -> str:
    parts = ", ".join(f"{number} {state}" for state, number in trials.items())
    return f"{sum(trials.values())}: {parts}"
