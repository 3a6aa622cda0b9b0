"""`--wait` of `submit`, `resume` and `status`: block until the jobs of a submission have ended."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from modis_dist.cli.options import warn

if TYPE_CHECKING:
    from modis_dist.integrations.slurm.submission_status import SubmissionStatus

POLL_S = 15.0  # sites limit the load on Slurm's controller
IN_PROGRESS = frozenset({"running", "waiting", "unknown"})


def wait_for_end(folder: Path, *, as_json: bool) -> None:
    """Block until no job of a submission is pending or running. Raises the error of the study, or ``Interrupted``."""
    from modis_dist.cli.tune import report
    from modis_dist.report.study_results import read_summary
    from modis_dist.runtime.errors import Interrupted, RunFailed

    try:
        status = _final_status(folder)
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped waiting; the jobs continue: `modis-dist status {folder} --wait` waits again, "
            f"`modis-dist cancel {folder}` cancels them"
        ) from None
    if status.state != "finished":
        raise RunFailed(f"{folder}: {status.advice}; its logs are in {folder / 'submission' / 'logs'}")
    summary = read_summary(folder)
    assert summary is not None, "a finished study has a summary"
    report(summary, folder, as_json=as_json)


def _final_status(folder: Path) -> "SubmissionStatus":
    from modis_dist.cli.display import SweepBars, progress_bars
    from modis_dist.integrations.slurm.submission_status import submission_status

    with progress_bars() as progress:
        bars = SweepBars(progress)
        shown, problem = None, ""
        while (status := submission_status(folder)).state in IN_PROGRESS:
            if status.state == "unknown" and status.advice != problem:
                warn(f"waiting: {status.advice}")
            problem = status.advice if status.state == "unknown" else ""
            packs = status.study.packs
            epochs = sum(pack.epochs or 0 for pack in packs)
            if shown != (status.study.stage, epochs):
                shown = (status.study.stage, epochs)
                bars.stage(status.study.stage, trials=sum(status.study.trials.values()), epochs=epochs)
            done, failed = status.study.trials.get("done", 0), len(status.study.failures)
            bars.update(epochs=sum(pack.epoch for pack in packs), done=done, failed=failed)
            time.sleep(POLL_S)
    return status
