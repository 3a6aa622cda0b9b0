"""A study from its first trial to its summary.

Running the same study on the same folder again resumes it where it stopped. The executor trains the packs (on Ray or in
this process), and an MLflow follower reads the run folder; this module depends on neither.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from modis_dist.config import parse
from modis_dist.execution.resource_errors import disk_errors
from modis_dist.execution.trial import Trial
from modis_dist.report.study_results import RankedGroup, Summary
from modis_dist.runtime.errors import RunFailed
from modis_dist.runtime.files import write_text
from modis_dist.runtime.lock import locked
from modis_dist.study import manifest
from modis_dist.study.aggregate import grouped
from modis_dist.study.interfaces import Executor, Tracking
from modis_dist.study.manifest import unique
from modis_dist.study.monitor import Display
from modis_dist.study.plan import Plan
from modis_dist.study.run_search import SearchOutcome, is_grid, run_search
from modis_dist.study.runner import PackRunner
from modis_dist.study.selection import by_rank, chosen, mark
from modis_dist.study.summary import failures, summarise, why_nothing, write


def run_study(
    planned: Plan, *, out: Path, executor: Executor, display: Display, tracking: Tracking | None = None
) -> Summary:
    """Train, select, refit and test; return the summary, which is also written to ``summary.json``.

    Raises ``Interrupted`` if the user stops it, ``RunFailed`` if no configuration is complete or the disk fails.
    """
    started = time.monotonic()
    study, metric = planned.study, planned.study.trainer.metric
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(out, patience_s=0), disk_errors(out):
        write_text(out / manifest.STUDY_FILE, parse.dump(study))
        manifest.save(out / manifest.FILE, planned.manifest)
        if tracking is not None:
            tracking.start()
        runner = PackRunner(planned, out, executor, display)

        # Train every trial that is not done: a grid at once, a search round by round and from rung to rung.
        trials, pruned, reasons = _train(planned, runner, out=out)

        # Select one configuration of each condition: groups over folds and replicates, on validation rows.
        results = runner.results(trials)
        reasons |= failures(results)
        groups = mark(grouped(trials, results, reasons, pruned), metric=metric)
        groups = by_rank(groups) if study.sweep.search else groups
        best = chosen(groups)

        # Refit it on all training rows. Test rows are scored only here, once.
        refits = {c: refit_trials(trials, group, planned.manifest.fingerprint) for c, group in best.items()}
        refitted = unique(trial for of_condition in refits.values() for trial in of_condition)
        reasons |= runner.train(runner.refit_packs(refitted), name="refit")
        results |= runner.results(refitted)

        # Summarise, report, and deliver a model.
        summary = summarise(planned.manifest, groups, best, refits, results, reasons, metric=metric, tracking=tracking)
        summary["seconds"] = round(time.monotonic() - started, 1)
        write(summary, out=out)
    if not best:
        raise RunFailed(why_nothing(summary, out))
    return summary


def _train(planned: Plan, runner: PackRunner, *, out: Path) -> SearchOutcome:
    """Train a grid, or search."""
    trials = planned.manifest.trials
    if is_grid(planned.study, runner.results(trials)):
        return SearchOutcome(trials, {}, runner.train(runner.packs(), name="search"))
    return run_search(planned, runner, out=out)


def refit_trials(trials: Sequence[Trial], group: RankedGroup, fingerprint: str) -> list[Trial]:
    """Return one refit per replicate of a group, each with as many epochs as the group's median best epoch."""
    replicates: dict[int, Trial] = {}
    for trial in trials:
        if trial.condition == group["condition"] and trial.id in group["trials"]:
            replicates.setdefault(trial.replicate, trial)
    assert group["epochs"] is not None, "a chosen group has a best epoch"
    return [manifest.refit(trial, fingerprint, epochs=group["epochs"]) for trial in replicates.values()]
