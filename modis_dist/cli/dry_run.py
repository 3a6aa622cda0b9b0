"""Printing of `--dry-run`: the plan of a study (`tune`) and its jobs (`submit`)."""

from collections import Counter
from typing import TYPE_CHECKING

from modis_dist.cli.options import say

if TYPE_CHECKING:
    from rich.table import Table

    from modis_dist.config.cluster import Site
    from modis_dist.planning.estimate import PackEstimate, StudyEstimate
    from modis_dist.planning.submission import SubmissionEstimate

TRIALS_SHOWN = 20


def print_plan(estimate: "StudyEstimate") -> None:
    """Print the trials, the packs and their estimated cost."""
    from modis_dist.cli.display import duration, size
    from modis_dist.report.terminal import show, stdout

    show([(f"{estimate.study}: {estimate.trials} trials", _trials(estimate))], stdout())
    if estimate.trials > TRIALS_SHOWN:
        say(f"... and {estimate.trials - TRIALS_SHOWN} more; --json lists all")
    show([("Packs to train, then the refit", _packs(estimate))], stdout())
    say(
        f"{estimate.done} of {estimate.trials} trials are done. The other trials ({len(estimate.packs)} packs, "
        f"{estimate.slots} at a time) and the refit take about {duration(estimate.seconds)} on "
        f"{estimate.measured_on}, without early stopping or pruning, and use {size(estimate.bytes)} of disk space."
    )
    if estimate.later_trials:
        say(f"{estimate.later_trials} trials of later rounds depend on results; each round is counted like the first.")
    if estimate.scratch:
        say(_features_on_disk(estimate))
    say("Dry run: nothing was started.")


def print_submission(estimate: "SubmissionEstimate", site: "Site") -> None:
    """Print the plan, the cost, warnings and job scripts."""
    from modis_dist.cli.doctor import print_finding

    print_plan(estimate.plan)
    say(f"form: {estimate.form} ({estimate.reason})")
    say(f"cost: {_cost(estimate, site)}")
    if estimate.longest_s > site.seconds and site.executor == "slurm":
        say(f"time limit: {_time_limit(estimate, site)}")
    for finding in estimate.findings:
        print_finding(finding)
    for name, text in estimate.scripts.items():
        say(f"--- {name}")
        say(text.rstrip())


def _trials(estimate: "StudyEstimate") -> "Table":
    from modis_dist.report.tables import add, empty, finished, numbers, parameters
    from modis_dist.runtime.text import plain

    table = empty("trial")
    parameters(table, "settings")
    if estimate.done:
        numbers(table, "")
    for trial in estimate.trial_list[:TRIALS_SHOWN]:
        add(table, trial.id, plain(trial.name, limit=200), *(["done" * trial.done] if estimate.done else []))
    return finished(table)


def _packs(estimate: "StudyEstimate") -> "Table":
    """Return the table of packs; packs with equal cells share a row."""
    from modis_dist.report.tables import add, empty, finished, numbers

    packs = [*estimate.packs, *estimate.refit_packs]
    on_gpu, on_disk = any(pack.gpu_memory for pack in packs), any(pack.scratch for pack in packs)
    table = empty("packs")
    columns = ["trials", "steps per training", "time", "saving", "memory", *["GPU"] * on_gpu, "disk"]
    numbers(table, *columns, *["scratch"] * on_disk)
    for stage, stage_packs in (("", estimate.packs), (", refit", estimate.refit_packs)):
        rows = Counter(tuple(_cells(pack, on_gpu=on_gpu, on_disk=on_disk)) for pack in stage_packs)
        for cells, count in rows.items():
            add(table, f"{count}{stage}", *cells)
    note = "saving: time spent on checkpoints; memory: computed from sizes, not measured"
    return finished(table, f"{note}; scratch: features in the temporary folder" if on_disk else note)


def _cells(pack: "PackEstimate", *, on_gpu: bool, on_disk: bool) -> list[str]:
    from modis_dist.cli.display import duration, size

    cells = [str(pack.trials), f"{pack.steps_per_training:,}", duration(pack.seconds), duration(pack.saving_s)]
    sizes = [pack.memory, *[pack.gpu_memory] * on_gpu, pack.bytes, *[pack.scratch] * on_disk]
    return cells + [size(bytes_) for bytes_ in sizes]


def _features_on_disk(estimate: "StudyEstimate") -> str:
    from modis_dist.cli.display import size

    if estimate.scratch_problem:
        return f"warning: {estimate.scratch_problem}"
    peak = f"Features in temporary folders: at most {size(estimate.scratch)} at once"
    if estimate.scratch_folder:
        return f"{peak}, in {estimate.scratch_folder} (TMPDIR), which has enough free space."
    largest = size(max(pack.scratch for pack in [*estimate.packs, *estimate.refit_packs]))
    return f"{peak}, up to {largest} per pack; check the free space on the nodes."


def _cost(estimate: "SubmissionEstimate", site: "Site") -> str:
    if estimate.gpu_hours is None or estimate.core_hours is None:
        return (
            f"GPU-hours unknown: this machine has no GPU. On its CPU the jobs would take "
            f"{_rounded(estimate.job_hours)} hours. Run the same command on a node with a GPU to measure GPU-hours"
        )
    gpus = f"{_rounded(estimate.gpu_hours)} GPU-hours, " if site.gpus else ""
    return f"about {gpus}{_rounded(estimate.core_hours)} core-hours, measured on {estimate.plan.measured_on}"


def _time_limit(estimate: "SubmissionEstimate", site: "Site") -> str:
    from math import ceil

    from modis_dist.cli.display import duration

    starts = ceil(estimate.longest_s / site.seconds)
    problem = "" if starts <= site.requeues + 1 else f"; requeues allows {site.requeues}: raise time or requeues"
    return (
        f"{estimate.longest_job} takes {duration(estimate.longest_s)}, time is {site.time}: it saves and is requeued "
        f"about {starts - 1} times{problem}"
    )


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
