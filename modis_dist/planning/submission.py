"""Estimate of a submission: the study's cost, its jobs and scripts, charged hours, rejected requests."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from modis_dist.config.cluster import Site
from modis_dist.config.study import Study
from modis_dist.integrations.slurm.capacity import check_capacity, check_saving, memory_of
from modis_dist.integrations.slurm.form import Form, slots_of
from modis_dist.integrations.slurm.job_script import options_of
from modis_dist.integrations.slurm.slurm_commands import check_request
from modis_dist.integrations.slurm.submit import scripts_of
from modis_dist.planning.estimate import Nodes, StudyEstimate, estimate_plan, planning_folder
from modis_dist.runtime.finding import Finding
from modis_dist.study.plan import plan

HOUR_S = 3600


@dataclass(frozen=True)
class SubmissionEstimate:
    """Cost of a study on a cluster."""

    plan: StudyEstimate
    form: Form
    reason: str  # for the form
    scripts: dict[str, str]  # by kind of job
    job_hours: float
    core_hours: float | None  # None if the site has GPUs and this machine has none to measure on
    gpu_hours: float | None
    longest_job: str
    longest_s: float
    findings: list[Finding]

    def as_json(self) -> dict[str, Any]:
        """Return plain values, those of the study at the top level."""
        values = asdict(self)
        return {**values.pop("plan"), **values}


def estimate_submission(
    study: Study, site: Site, form: Form, reason: str, out: Path, *, source: Path
) -> SubmissionEstimate:
    """Return the cost of the remaining part of a study on a cluster. Submits and writes nothing."""
    slots = slots_of(study, site, form)
    nodes = Nodes(
        slots=slots,
        refit_slots=1 if form == "array" else slots,  # the last job trains the refit packs one by one
        threads=min(study.sweep.resources.cpus or site.cpus, site.cpus),
        timing_folder=out,
        remote=True,
        memory=memory_of(site),
    )
    with planning_folder(study, out) as folder:
        planned = plan(study, out=folder, slots=slots, source=str(source), gpu=site.gpus > 0)
        estimate = estimate_plan(planned, folder, nodes, start_s=0.0)
        scripts = scripts_of(planned, site, form=form, out=out)
    hours = (estimate.pack_seconds if form == "array" else estimate.seconds * site.nodes) / HOUR_S
    measured = torch.cuda.is_available() or not site.gpus
    longest_job, longest_s = longest(estimate, form)
    findings = []
    if site.executor == "slurm":
        slowest = max((pack.save_s for pack in [*estimate.packs, *estimate.refit_packs]), default=0.0)
        findings = [check_request(options_of(text), check=f"sbatch {name}") for name, text in scripts.items()]
        findings += [*check_capacity(planned, site), check_saving(slowest, site)]
    return SubmissionEstimate(
        plan=estimate,
        form=form,
        reason=reason,
        scripts=scripts,
        job_hours=hours,
        core_hours=hours * site.cpus if measured else None,
        gpu_hours=hours * site.gpus if measured else None,
        longest_job=longest_job,
        longest_s=longest_s,
        findings=findings,
    )


def longest(estimate: StudyEstimate, form: Form) -> tuple[str, float]:
    """Return the job that takes longest and its seconds."""
    if form == "allocation":
        return "the job", estimate.seconds
    pack_s = max((pack.seconds for pack in estimate.packs), default=0.0)
    last_s = estimate.refit_seconds
    return ("the longest pack", pack_s) if pack_s >= last_s else ("the last job (refit)", last_s)
