"""Waiting for the end of a submission: `--wait` of `submit`, `resume` and `status`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

from modis_dist.cli.options import print_json

if TYPE_CHECKING:
    from modis_dist.integrations.slurm.submission_status import SubmissionStatus

LOOK_S = 15.0  # a queue's commands are a load that sites count
GOING_ON = frozenset({"running", "waiting", "unknown"})


def wait_for_end(folder: Path, *, as_json: bool) -> None:
    """Until no job of a submission runs or will. Raises what the study ended with, or ``Interrupted``."""
    from modis_dist.cli.tune import fail_if_incomplete, print_summary
    from modis_dist.report.study_results import read_summary
    from modis_dist.runtime.errors import Interrupted, RunFailed

    try:
        found = _ended(folder)
    except KeyboardInterrupt:
        raise Interrupted(
            f"not waiting any more; the jobs go on: `modis-dist status {folder} --wait` waits again, "
            f"`modis-dist cancel {folder}` ends them"
        ) from None
    if found.state != "finished":
        raise RunFailed(f"{folder}: {found.advice}; its logs are in {folder / 'submission' / 'logs'}")
    summary = read_summary(folder)
    assert summary is not None, "a finished study has a summary"
    print_json(summary) if as_json else print_summary(summary, folder)
    fail_if_incomplete(summary, folder)


def _ended(folder: Path) -> "SubmissionStatus":
    """How a submission stands when it does not go on any more."""
    from modis_dist.cli.display import errors, sweep_bars
    from modis_dist.integrations.slurm.submission_status import standing

    with sweep_bars() as bars:
        shown, silent = None, ""
        while (found := standing(folder)).state in GOING_ON:
            if found.state == "unknown" and found.advice != silent:
                errors().print(f"waiting on: {found.advice}", markup=False, soft_wrap=True)
            silent = found.advice if found.state == "unknown" else ""
            packs = found.study.packs
            epochs = sum(pack.epochs or 0 for pack in packs)
            if shown != (found.study.stage, epochs):
                shown = (found.study.stage, epochs)
                bars.stage(found.study.stage, trials=sum(found.study.trials.values()), epochs=epochs)
            done, failed = found.study.trials.get("done", 0), len(found.study.failures)
            bars.update(epochs=sum(pack.epoch for pack in packs), done=done, failed=failed)
            time.sleep(LOOK_S)
    return found
