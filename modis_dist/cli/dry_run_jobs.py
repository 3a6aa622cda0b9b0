"""What `modis-dist submit --dry-run` prints: what a study comes to, its jobs, what they cost and what Slurm says."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modis_dist.cli.options import print_json

if TYPE_CHECKING:
    from modis_dist.config.cluster import Site
    from modis_dist.config.study import Study
    from modis_dist.integrations.slurm.submission import Form
    from modis_dist.runtime.finding import Finding
    from modis_dist.study.plan import Plan

HOUR_S = 3600


def foresee(
    wanted: "Study", site: "Site", form: "Form", why: str, folder: Path, *, source: Path, as_json: bool
) -> None:
    """Everything that would be submitted, and about what it costs."""
    import tempfile
    from dataclasses import asdict

    from modis_dist.cli.dry_run import foreseen
    from modis_dist.cli.tune import planning_place
    from modis_dist.integrations.slurm.capacity import memory_of
    from modis_dist.integrations.slurm.submission import scripts_of, slots_of
    from modis_dist.study.plan import plan

    slots = slots_of(wanted, site, form)
    with tempfile.TemporaryDirectory() as nowhere:
        place = planning_place(wanted, folder, Path(nowhere))
        planned = plan(wanted, out=place, slots=slots, source=str(source), gpu=site.gpus > 0)
        plain = foreseen(
            planned,
            place,
            folder=folder,
            slots=slots,
            refit_slots=1 if form == "array" else slots,  # the last job trains them one after the other
            threads=min(wanted.sweep.resources.cpus or site.cpus, site.cpus),
            start_s=0.0,
            elsewhere=True,
            memory=memory_of(site),
        )
        plain["form"], plain["why"] = form, why
        plain["scripts"] = scripts_of(planned, site, form=form, out=folder)
        plain |= _hours(plain, site, form)
        findings = _findings(planned, plain, site, form)
    if as_json:
        print_json(plain | {"limits": [asdict(finding) for finding in findings]})
    else:
        _print(plain, site, findings)


def _findings(planned: "Plan", plain: dict[str, Any], site: "Site", form: "Form") -> "list[Finding]":
    """Whether nodes and the queue have room for it."""
    from modis_dist.integrations.slurm.capacity import room, saving
    from modis_dist.integrations.slurm.checks import limits
    from modis_dist.integrations.slurm.job_script import requests

    if site.executor != "slurm":
        return []
    asked = requests(site, nodes=site.nodes if form == "allocation" else 1)
    jobs = len(plain["packs"]) + 1 if form == "array" else 1
    slowest = max((row["save_s"] for row in [*plain["packs"], *plain["refit_packs"]]), default=0.0)
    return [*limits(site, requests=asked, jobs=jobs), *room(planned, site), saving(slowest, site)]


def _hours(plain: dict[str, Any], site: "Site", form: "Form") -> dict[str, Any]:
    """Hours of jobs, and of the cores and GPUs that will be charged for them; None where the probe had no GPU."""
    import torch

    job_hours = (plain["pack_seconds"] if form == "array" else plain["seconds"] * site.nodes) / HOUR_S
    known = torch.cuda.is_available() or not site.gpus
    return {
        "job_hours": job_hours,
        "core_hours": job_hours * site.cpus if known else None,
        "gpu_hours": job_hours * site.gpus if known else None,
    }


def _print(plain: dict[str, Any], site: "Site", findings: "list[Finding]") -> None:
    from modis_dist.cli.doctor import print_finding
    from modis_dist.cli.dry_run import print_plan
    from modis_dist.report.terminal import stdout

    console = stdout()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    print_plan(plain)
    say(f"form: {plain['form']}, {plain['why']}")
    _say_cost(plain, site, say)
    for finding in findings:
        print_finding(finding)
    for name, text in plain["scripts"].items():
        say(f"--- {name}")
        say(text.rstrip())


def _say_cost(plain: dict[str, Any], site: "Site", say: Callable[[str], None]) -> None:
    if plain["gpu_hours"] is None:
        say(
            f"cost: GPU-hours are not known, for this machine has no GPU; its processor would take "
            f"{_rounded(plain['job_hours'])} hours of jobs. The same command on a node with a GPU measures them"
        )
        return
    gpus = f"{_rounded(plain['gpu_hours'])} GPU-hours, " if site.gpus else ""
    say(f"cost: about {gpus}{_rounded(plain['core_hours'])} core-hours, measured on {plain['measured_on']}")
    name, seconds = _longest(plain)
    if seconds > site.seconds and site.executor == "slurm":
        say(f"      {name} takes {_beyond_limit(seconds, site)}")


def _longest(plain: dict[str, Any]) -> tuple[str, float]:
    """The job that takes longest, and its seconds."""
    if plain["form"] == "allocation":
        return "the job", plain["seconds"]
    pack = max((row["seconds"] for row in plain["packs"]), default=0.0)
    last = plain["refit_seconds"]
    return ("the longest pack", pack) if pack >= last else ("the last job, with the refit,", last)


def _beyond_limit(seconds: float, site: "Site") -> str:
    from math import ceil

    from modis_dist.cli.display import duration

    starts = ceil(seconds / site.seconds)
    enough = "" if starts <= site.requeues + 1 else f"; only {site.requeues} are allowed: raise time or requeues"
    return (
        f"{duration(seconds)}, the limit is {site.time}: it saves, is queued again and goes on, some {starts - 1} "
        f"times{enough}"
    )


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.2g}"
